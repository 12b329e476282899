"""The main job in small: adapt a vision-language model to another domain, by every method, on real images.

`make demo`, or `python -m peft_kernels.demo`. A BLIP of transformers, sized for a CPU, is trained on the spot on scenes
of scikit-learn's real handwritten digits with captions, and then moved to another domain: other layouts, inverted and
rotated strokes, other words.
"""

from importlib.util import find_spec

if _missing := [name for name in ("matplotlib", "rich", "sklearn", "transformers") if find_spec(name) is None]:
    raise ModuleNotFoundError(f"the demo needs {', '.join(_missing)}: pip install 'peft_kernels[demo]'")
