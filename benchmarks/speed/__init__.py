"""What ``benchmarks/speed.py`` is made of, one file a subject.

    program     arguments, parts, budget
    processes   one process a part, stopped in time; several side by side
    quiet       their timing sections: one at a time, the others stopped
    record      a part's JSON: kept after every item, found again by the next call
    timing      seconds on a device: CUDA graphs and events, or the clock on the wall
    ceilings    what the machine can do: copy, bf16 product, int8 product
    models      the networks' configs and inputs
    shapes      their products and convolutions, operations and bytes (no GPU)
    networks    the same networks as packed bitbrush layers, random codes
    steps       a whole step: eager, compiled, in a CUDA graph; ours beside bf16
    kernels     single products, convolutions, encodes, layers
    memory      peak of loading and one step
    peers       other libraries, each in a process of its own
    ours        every call of bitbrush's kernels and of nothing else
    summary     the figures that have a bar
"""
