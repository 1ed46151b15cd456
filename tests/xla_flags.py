"""The flags with which XLA compiles quickly rather than well; as a script it prints them."""

import importlib.metadata

# XLA aborts the process on a flag that it does not know, so ask before JAX is imported.
_JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))

# One thread for each program, since the tests keep every core busy.
QUICK = "--xla_cpu_parallel_codegen_split_count=1"
if _JAXLIB < (0, 12):
    # The older code generator compiles in half of the time.
    QUICK += " --xla_cpu_use_fusion_emitters=false"

if __name__ == "__main__":
    print(QUICK)
