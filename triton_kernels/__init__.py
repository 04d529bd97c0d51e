"""The Triton backend's home, installed as `fusedopt.triton_kernels`; empty in this version.

This version runs on the CPU only. The backend, when it comes, has one file a rule here: the
line-for-line twin of `csrc/rules/<rule>.h`.
"""
