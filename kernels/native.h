/* What the C kernels share: vectors as wide as the machine's, and products of a few rows with a weight.

   A weight is read once for all rows, four of its own rows at a time, so that a few rows cost little more than one.
   Every element of a result is summed in one order that depends on nothing but its length: whatever other rows are in
   the batch, a row's result is the same to the last bit. */

#ifndef DSENGINE_NATIVE_H
#define DSENGINE_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define thread_number() omp_get_thread_num()
#else
#define thread_number() 0
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define SMALL_WORK (1 << 18) /* multiplications below which waking other threads costs more than they save */

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* The sums of four vectors. Halves, then quarters are added, so that one vector serves all four. */
#if LANES == 16
#define FIRST_HALVES 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define SECOND_HALVES 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define FIRST_QUARTERS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define SECOND_QUARTERS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#elif LANES == 8
#define FIRST_HALVES 0, 1, 2, 3, 8, 9, 10, 11
#define SECOND_HALVES 4, 5, 6, 7, 12, 13, 14, 15
#define FIRST_QUARTERS 0, 1, 4, 5, 8, 9, 12, 13
#define SECOND_QUARTERS 2, 3, 6, 7, 10, 11, 14, 15
#else
#define FIRST_HALVES 0, 1, 4, 5
#define SECOND_HALVES 2, 3, 6, 7
#define FIRST_QUARTERS 0, 2, 4, 6
#define SECOND_QUARTERS 1, 3, 5, 7
#endif
#define SHUFFLE __builtin_shufflevector

INLINE void sum_lanes(const floats v[4], float sums[4])
{
    const floats ab = SHUFFLE(v[0], v[1], FIRST_HALVES) + SHUFFLE(v[0], v[1], SECOND_HALVES);
    const floats cd = SHUFFLE(v[2], v[3], FIRST_HALVES) + SHUFFLE(v[2], v[3], SECOND_HALVES);
    const floats abcd = SHUFFLE(ab, cd, FIRST_QUARTERS) + SHUFFLE(ab, cd, SECOND_QUARTERS);
    for (int n = 0; n < 4; n++) {
        sums[n] = 0.0f;
        for (int i = 0; i < LANES / 4; i++)
            sums[n] += abcd[n * LANES / 4 + i];
    }
}

/* out[m][n] = x[m] · w[n] for M rows of x (known when compiled: all sums stay in registers) and up to four of w. */
INLINE void multiply_tile(const int M, const float *x, int64_t x_stride, const float *const w[4], int64_t k, float *out,
                          int64_t out_stride, int64_t columns)
{
    floats sums[4][4] = {{{0}}};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            const floats weight = *(const floats *)(w[n] + i);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++)
                sums[m][n] += *(const floats *)(x + m * x_stride + i) * weight;
        }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        float dot[4];
        sum_lanes(sums[m], dot);
        for (int64_t rest = i; rest < k; rest++)
            for (int n = 0; n < 4; n++)
                dot[n] += x[m * x_stride + rest] * w[n][rest];
        for (int64_t n = 0; n < columns; n++)
            out[m * out_stride + n] = dot[n];
    }
}

/* Four rows of w, or the `columns` that are left at its end: then some are computed twice, so that all sum alike. */
INLINE void multiply_rows(const float *x, int64_t x_stride, int64_t rows, const float *w, int64_t w_stride, int64_t k,
                          float *out, int64_t out_stride, int64_t columns)
{
    const float *four[4];
    for (int64_t n = 0; n < 4; n++)
        four[n] = w + (n < columns ? n : 0) * w_stride;
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)
        multiply_tile(4, x + m * x_stride, x_stride, four, k, out + m * out_stride, out_stride, columns);
    x += m * x_stride;
    out += m * out_stride;
    switch (rows - m) {
    case 3: multiply_tile(3, x, x_stride, four, k, out, out_stride, columns); break;
    case 2: multiply_tile(2, x, x_stride, four, k, out, out_stride, columns); break;
    case 1: multiply_tile(1, x, x_stride, four, k, out, out_stride, columns); break;
    }
}

/* out [rows, n] = x [rows, k] · wᵀ, w [n, k] with its rows w_stride apart. */
INLINE void multiply(const float *x, int64_t x_stride, int64_t rows, const float *w, int64_t w_stride, int64_t n,
                     int64_t k, float *out, int64_t out_stride)
{
#pragma omp parallel for schedule(static) if (rows * n * k > SMALL_WORK)
    for (int64_t start = 0; start < n; start += 4)
        multiply_rows(x, x_stride, rows, w + start * w_stride, w_stride, k, out + start, out_stride,
                      n - start < 4 ? n - start : 4);
}

/* out [rows, columns] += x [rows, count] · w [count, columns] for up to four rows, whose number is known when compiled. */
INLINE void add_tile(const int ROWS, const float *x, int64_t x_stride, const float *w, int64_t w_stride, int64_t count,
                     int64_t columns, float *out, int64_t out_stride)
{
    int64_t c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES) {
        floats sums[4][4];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                sums[r][v] = *(const floats *)(out + r * out_stride + c + v * LANES);
        for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                const floats weight = *(const floats *)(w + i * w_stride + c + v * LANES);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++)
                    sums[r][v] += x[r * x_stride + i] * weight;
            }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                *(floats *)(out + r * out_stride + c + v * LANES) = sums[r][v];
    }
    for (; c < columns; c++)
        for (int r = 0; r < ROWS; r++)
            for (int64_t i = 0; i < count; i++)
                out[r * out_stride + c] += x[r * x_stride + i] * w[i * w_stride + c];
}

/* out [rows, columns] += x [rows, count] · w [count, columns]. */
INLINE void add_products(int64_t rows, const float *x, int64_t x_stride, const float *w, int64_t w_stride, int64_t count,
                         int64_t columns, float *out, int64_t out_stride)
{
    for (; rows >= 4; rows -= 4, x += 4 * x_stride, out += 4 * out_stride)
        add_tile(4, x, x_stride, w, w_stride, count, columns, out, out_stride);
    switch (rows) {
    case 3: add_tile(3, x, x_stride, w, w_stride, count, columns, out, out_stride); break;
    case 2: add_tile(2, x, x_stride, w, w_stride, count, columns, out, out_stride); break;
    case 1: add_tile(1, x, x_stride, w, w_stride, count, columns, out, out_stride); break;
    }
}

/* exp(x) to about 1 ulp: 2^n · e^r with |r| <= ln 2 / 2, a polynomial for e^r (Cephes' expf). Without branches or calls,
   so that compilers turn loops over it into vectors. */
INLINE float exponential(float x)
{
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.0f ? 88.0f : x;
    const float whole = rintf(x * 1.44269504f);
    const float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* silu(gate) · up of one row. */
INLINE void swiglu(const float *restrict gate, const float *restrict up, float *restrict out, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

/* x · rsqrt(mean(x²) + eps) · weight. */
INLINE void normalize(const float *restrict x, const float *restrict weight, float eps, float *restrict out, int64_t n)
{
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; i++)
        squares += x[i] * x[i];
    const float factor = 1.0f / sqrtf(squares / n + eps);
    for (int64_t i = 0; i < n; i++)
        out[i] = x[i] * factor * weight[i];
}

#endif
