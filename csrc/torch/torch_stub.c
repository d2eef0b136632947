/* Empty stand-in for libtorch_cpu.so, used at link time only and never installed.
   It gives libhstu_ops.so a DT_NEEDED entry "libtorch_cpu.so", which the copy that `import torch` has already
   loaded satisfies; without that entry the loader would not look for the ABI functions there. */
void hstu_ops_torch_stub(void) {}
