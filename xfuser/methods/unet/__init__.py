"""DistriFusion, and naive patches, of U-Nets: their maps are divided by rows."""
