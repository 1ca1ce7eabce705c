"""Facts about the machine: processor, cores, NVIDIA driver, TensorRT modules, versions."""
