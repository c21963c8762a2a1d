#include "../native.h"

void silu_mul(const float *gate_up, int64_t stride, float *out, int64_t rows, int64_t n)
{
    for (int64_t row = 0; row < rows; row++)
        swiglu(gate_up + row * stride, gate_up + row * stride + n, out + row * n, n);
}
