"""The operations, one file each: the mathematics, the reference, the autograd.Function and the public function."""
