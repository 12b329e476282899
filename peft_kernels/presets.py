"""Where adapters go in the models that people adapt: module names, and what an adapter must know of them.

Names are those of transformers (5.x), which nothing here imports. Sources of the targets: docs/method.md, sections 3
and 4.
"""

from dataclasses import dataclass

from peft_kernels.checks import check_choice, check_flag

MODALITIES = ("vision", "text", "cross")
PLACEMENTS = ("input", "output")


@dataclass(frozen=True)
class Target:
    """Linear layers of one kind.

    pattern: a regular expression that whole module names match
    modality: "vision" | "text" | "cross": where Aurora drops, and what it shares by
    input: a name for what they read. Neighbours that read the same share MoIL's transform and Aurora's x U.
    projections: how many are fused into one linear layer: 3 for a qkv
    placement: of MoIL's transform: on the "input", or for a fc2 on the "output"
    reads_weight: the model does not call the layer, but reads its weight, which then is the adapted one
    """

    pattern: str
    modality: str = "text"
    input: str = "hidden"
    projections: int = 1
    placement: str = "input"
    reads_weight: bool = False

    def __post_init__(self):
        for name in ("pattern", "input"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected a string, got {getattr(self, name)!r}")
        check_choice("modality", self.modality, MODALITIES)
        check_choice("placement", self.placement, PLACEMENTS)
        check_flag("reads_weight", self.reads_weight)
        if isinstance(self.projections, bool) or not isinstance(self.projections, int) or self.projections < 1:
            raise ValueError(f"projections: expected an integer ≥ 1, got {self.projections!r}")


@dataclass(frozen=True)
class Preset:
    """targets: always adapted;  ffn: where a configuration asks for the feed-forward layers too
    heads: modules that train whole, where the model has them;  gates: layers for the gated query transformation
    whole: every target has to be there; False where some stand for others, or for a part that a model may lack
    outputs: what gives the result of attention and of the feed-forward layers, where UniAdapter adds its own
    """

    targets: tuple[Target, ...]
    ffn: tuple[Target, ...] = ()
    heads: tuple[str, ...] = ()
    gates: str | None = None
    outputs: tuple[Target, ...] = ()
    whole: bool = True


def _attention(prefix: str, modality: str = "text", names: str = "query|key|value") -> Target:
    return Target(rf"{prefix}\.({names})", modality)


def _crossing(prefix: str, names: tuple[str, str] = ("query", "key|value")) -> tuple[Target, Target]:
    """Cross-attention: the query reads one modality, keys and values the other."""
    return Target(rf"{prefix}\.({names[0]})", "cross"), Target(rf"{prefix}\.({names[1]})", "cross", "context")


def _feed_forward(up: str, down: str, modality: str = "text") -> tuple[Target, Target]:
    return Target(up, modality), Target(down, modality, placement="output")


_LAYER = r"(.*\.)?layers?\.\d+"
_BLIP_TEXT = r"(.*\.)?text_(en|de)coder\.(bert\.)?encoder\.layer\.\d+"
_BLIP_VISION = r"(.*\.)?vision_model\.encoder\.layers\.\d+"
_BLIP_QKV = Target(_BLIP_VISION + r"\.self_attn\.qkv", "vision", projections=3)
_BLIP_SELF = _attention(_BLIP_TEXT + r"\.attention\.self")
_BLIP_CROSS = _crossing(_BLIP_TEXT + r"\.crossattention\.self")
_BLIP_VISION_FFN = _feed_forward(_BLIP_VISION + r"\.mlp\.fc1", _BLIP_VISION + r"\.mlp\.fc2", "vision")
_BLIP_TEXT_FFN = _feed_forward(_BLIP_TEXT + r"\.intermediate\.dense", _BLIP_TEXT + r"\.output\.dense")
_BLIP_OUTPUTS = (
    Target(_BLIP_VISION + r"\.(self_attn\.projection|mlp\.fc2)", "vision"),
    Target(_BLIP_TEXT + r"\.(attention\.output|output)\.dense"),
    Target(_BLIP_TEXT + r"\.crossattention\.output\.dense", "cross"),
)
_RETRIEVAL_HEADS = ("vision_proj", "text_proj", "itm_head")

_BLIP = (_BLIP_QKV, _BLIP_SELF, *_BLIP_CROSS)
# Aurora's release adapts the whole vision layer, and queries, keys and values of text
_BLIP_PROJECTION = Target(_BLIP_VISION + r"\.self_attn\.projection", "vision", "attention")
_RELEASED = (_BLIP_QKV, _BLIP_PROJECTION, *_BLIP_VISION_FFN, _BLIP_SELF, *_BLIP_CROSS)

_BRIDGE_CROSS = r"(.*\.)?cross_modal_(text|image)_layers\.\d+"
_BRIDGE_TEXT = r"(.*\.)?text_model\.encoder\.layer\.\d+"
_BERT_FFN = _feed_forward(_LAYER + r"\.intermediate\.dense", _LAYER + r"\.output\.dense")
_LXMERT = r"(.*\.)?x_layers\.\d+"
_EXPERT = r"(.*\.)?blocks\.\d+\.mlp_{}\.{}"
_CLIP = r"(.*\.)?{}_model\.encoder\.layers\.\d+"

PRESETS: dict[str, Preset] = {
    "vilt": Preset(
        (_attention(_LAYER + r"\.attention\.attention", "cross"),),
        _BERT_FFN,
        ("classifier", "rank_output"),  # the pooler is pretrained, and frozen as by MoIL's authors
        outputs=(Target(_LAYER + r"\.(attention\.output|output)\.dense", "cross"),),
    ),
    "blip": Preset(_BLIP, (*_BLIP_VISION_FFN, *_BLIP_TEXT_FFN), _RETRIEVAL_HEADS, outputs=_BLIP_OUTPUTS),
    "blip-retrieval": Preset(_RELEASED, heads=_RETRIEVAL_HEADS, gates=_BLIP_TEXT),
    "blip-vqa": Preset(_RELEASED, gates=_BLIP_TEXT),
    "blip-video": Preset(_RELEASED, heads=_RETRIEVAL_HEADS, gates=_BLIP_TEXT),
    "cross": Preset(_BLIP_CROSS, heads=_RETRIEVAL_HEADS, gates=_BLIP_TEXT),
    "paper": Preset(_BLIP, heads=_RETRIEVAL_HEADS, gates=_BLIP_TEXT),
    "bridgetower": Preset(
        (
            _attention(_BRIDGE_TEXT + r"\.attention\.self"),
            _attention(_BRIDGE_CROSS + r"\.attention\.self", "cross"),
            *_crossing(_BRIDGE_CROSS + r"\.crossattention\.self"),
        ),
        (
            *_feed_forward(_BRIDGE_TEXT + r"\.intermediate\.dense", _BRIDGE_TEXT + r"\.output\.dense"),
            *_feed_forward(_BRIDGE_CROSS + r"\.intermediate\.dense", _BRIDGE_CROSS + r"\.output\.dense", "cross"),
        ),
        ("itm_score", "cross_modal_image_pooler", "cross_modal_text_pooler"),
    ),
    "lxmert": Preset(
        (
            _attention(r"(.*\.)?encoder\.layer\.\d+\.attention\.self"),
            _attention(r"(.*\.)?r_layers\.\d+\.attention\.self", "vision"),
            _attention(_LXMERT + r"\.lang_self_att\.self"),
            _attention(_LXMERT + r"\.visn_self_att\.self", "vision"),
            *_crossing(_LXMERT + r"\.visual_attention\.att"),
        ),
        (
            *_feed_forward(
                r"(.*\.)?encoder\.layer\.\d+\.intermediate\.dense", r"(.*\.)?encoder\.layer\.\d+\.output\.dense"
            ),
            *_feed_forward(
                r"(.*\.)?r_layers\.\d+\.intermediate\.dense", r"(.*\.)?r_layers\.\d+\.output\.dense", "vision"
            ),
            *_feed_forward(_LXMERT + r"\.lang_inter\.dense", _LXMERT + r"\.lang_output\.dense"),
            *_feed_forward(_LXMERT + r"\.visn_inter\.dense", _LXMERT + r"\.visn_output\.dense", "vision"),
        ),
        ("answer_head",),
    ),
    "visualbert": Preset((_attention(_LAYER + r"\.attention\.self", "cross"),), _BERT_FFN, ("cls",)),
    # In the authors' own code, https://github.com/microsoft/unilm/tree/master/vlmo: experts of each modality behind one
    # attention, which reads the weight of its qkv to add q_bias and v_bias
    "vlmo": Preset(
        (Target(r"(.*\.)?blocks\.\d+\.attn\.qkv", "cross", projections=3, reads_weight=True),),
        (
            *_feed_forward(_EXPERT.format("text", "fc1"), _EXPERT.format("text", "fc2")),
            *_feed_forward(_EXPERT.format("imag", "fc1"), _EXPERT.format("imag", "fc2"), "vision"),
            *_feed_forward(_EXPERT.format("vl", "fc1"), _EXPERT.format("vl", "fc2"), "cross"),
        ),
        ("pooler", "vqa_classifier", "nlvr2_classifier"),
        outputs=(Target(r"(.*\.)?blocks\.\d+\.(attn\.proj|mlp_\w+\.fc2)", "cross"),),
    ),
    "clip": Preset(
        (
            _attention(_CLIP.format("vision") + r"\.self_attn", "vision", "q_proj|k_proj|v_proj"),
            _attention(_CLIP.format("text") + r"\.self_attn", names="q_proj|k_proj|v_proj"),
            # One tower alone, in transformers 5: its name is gone, and with it the modality
            _attention(r"encoder\.layers\.\d+\.self_attn", names="q_proj|k_proj|v_proj"),
        ),
        (
            *_feed_forward(_CLIP.format("vision") + r"\.mlp\.fc1", _CLIP.format("vision") + r"\.mlp\.fc2", "vision"),
            *_feed_forward(_CLIP.format("text") + r"\.mlp\.fc1", _CLIP.format("text") + r"\.mlp\.fc2"),
            *_feed_forward(r"encoder\.layers\.\d+\.mlp\.fc1", r"encoder\.layers\.\d+\.mlp\.fc2"),
        ),
        ("visual_projection", "text_projection", "classifier"),
        whole=False,
    ),
    # Any transformer that names its layers as BERT, ViT or timm do
    "bert": Preset(
        (
            _attention(r"(.*\.)?(layers?|blocks)\.\d+\.(attention|attn)\.self"),
            *_crossing(r"(.*\.)?(layers?|blocks)\.\d+\.crossattention\.self"),
        ),
        _BERT_FFN,
        ("classifier", "score", "qa_outputs"),  # what peft trains for these tasks, too: no checkpoint of a base has it
        whole=False,
    ),
    "vit": Preset(
        (
            _attention(r"(.*\.)?(layers?|blocks)\.\d+\.attention\.attention", "vision"),  # transformers 4
            _attention(r"(.*\.)?(layers?|blocks)\.\d+\.(attention|self_attn)", "vision", "q_proj|k_proj|v_proj"),
            Target(r"(.*\.)?(layers?|blocks)\.\d+\.(attn|self_attn|attention)\.qkv", "vision", projections=3),
        ),
        (
            *_feed_forward(_LAYER + r"\.intermediate\.dense", _LAYER + r"\.output\.dense", "vision"),
            *_feed_forward(
                r"(.*\.)?(layers?|blocks)\.\d+\.mlp(_\w+)?\.fc1",  # VLMo's experts: mlp_imag, mlp_text
                r"(.*\.)?(layers?|blocks)\.\d+\.mlp(_\w+)?\.fc2",
                "vision",
            ),
        ),
        # The last are timm's, a linear layer or a module with one; SigLIP's `head` is a pretrained part of its towers
        ("classifier", "cls_classifier", "distillation_classifier", "head.weight", "head.bias", "head.fc"),
        whole=False,
    ),
}
