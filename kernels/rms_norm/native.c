#include "../native.h"

void rms_norm(const float *x, int64_t x_stride, const float *weight, float eps, float *out, int64_t rows, int64_t n)
{
    for (int64_t row = 0; row < rows; row++)
        normalize(x + row * x_stride, weight, eps, out + row * n, n);
}

/* total = x + residual; out is its norm. All are [rows, n], contiguous. */
void add_rms_norm(const float *restrict x, const float *restrict residual, const float *weight, float eps,
                  float *restrict out, float *restrict total, int64_t rows, int64_t n)
{
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t i = row * n; i < (row + 1) * n; i++)
            total[i] = x[i] + residual[i];
        normalize(total + row * n, weight, eps, out + row * n, n);
    }
}
