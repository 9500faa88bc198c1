"""What a low-bit number is: grids, specs, encode and decode, ranges, rounding, packing."""
