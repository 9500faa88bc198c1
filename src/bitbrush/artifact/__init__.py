"""What is on disk: a plain diffusers folder with a manifest. Saving, checking, loading, and the diffusers plug-in.

Loading needs `numbers`, `network` and `kernels` only; it never imports the steps, the recipes or the engine.
"""
