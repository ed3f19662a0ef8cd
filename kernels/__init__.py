"""Kernels of the patch terms: Triton for GPUs, C++ for CPUs. Nothing of halo_fast is imported here."""
