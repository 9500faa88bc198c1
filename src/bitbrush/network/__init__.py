"""The model, wrapped: quantized layers, the clock, attention operands, and adapters to diffusers' networks."""
