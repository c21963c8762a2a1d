#include "../native.h"

/* Turns the pairs (2 i, 2 i + 1) of x by the angles of one position, [cosines | sines]. */
static void rotate(const float *x, const float *cos_sin, float *out, int64_t rope)
{
    for (int64_t i = 0; i < rope / 2; i++) {
        const float c = cos_sin[i], s = cos_sin[rope / 2 + i], even = x[2 * i], odd = x[2 * i + 1];
        out[2 * i] = even * c - odd * s;
        out[2 * i + 1] = even * s + odd * c;
    }
}

void mla_prep(const float *q_rope, int64_t q_token_stride, int64_t q_head_stride, const float *kv_a, int64_t kv_stride,
              const float *weight, float eps, const float *cos_sin, const int64_t *positions, const int64_t *slots,
              float *kv_cache, float *rotated, float *rows, int64_t tokens, int64_t heads, int64_t rank, int64_t rope)
{
    const int64_t width = rank + rope;
    for (int64_t t = 0; t < tokens; t++) {
        const float *const angles = cos_sin + positions[t] * rope;
        float *const row = rows + t * width;
        for (int64_t h = 0; h < heads; h++)
            rotate(q_rope + t * q_token_stride + h * q_head_stride, angles, rotated + (t * heads + h) * rope, rope);
        normalize(kv_a + t * kv_stride, weight, eps, row, rank);
        rotate(kv_a + t * kv_stride + rank, angles, row + rank, rope);
        if (slots[t] >= 0)
            memcpy(kv_cache + slots[t] * width, row, sizeof(float) * width);
    }
}
