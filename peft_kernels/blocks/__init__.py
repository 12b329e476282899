"""Parts of transformers as one autograd node each, made of the operations' launchers on every backend."""
