#include "../native.h"

void linear(const float *x, int64_t x_stride, const float *weight, float *out, int64_t rows, int64_t n, int64_t k)
{
    multiply(x, x_stride, rows, weight, k, n, k, out, n);
}
