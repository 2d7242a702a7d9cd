"""DistriFusion and naive patches of U-Nets: feature maps are divided by rows or columns."""
