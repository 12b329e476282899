"""The operations in Triton. Imports torch and triton only; installed as peft_kernels.triton_kernels."""
