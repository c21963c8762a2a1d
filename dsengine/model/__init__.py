"""DeepSeek's architecture, written against the operations of `dsengine.kernels`."""
