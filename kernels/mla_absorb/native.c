#include "../native.h"

/* out [tokens, heads, rank]: each head's q [tokens, nope] · w_uk [nope, rank]. */
void absorb_queries(const float *q, int64_t token_stride, int64_t head_stride, const float *w_uk, int64_t w_stride,
                    float *out, int64_t tokens, int64_t heads, int64_t nope, int64_t rank)
{
    memset(out, 0, sizeof(float) * tokens * heads * rank);
#pragma omp parallel for schedule(static) if (tokens * heads * nope * rank > SMALL_WORK)
    for (int64_t h = 0; h < heads; h++)
        add_products(tokens, q + h * head_stride, token_stride, w_uk + h * w_stride, rank, nope, rank, out + h * rank,
                     heads * rank);
}

/* out [tokens, heads, width]: each head's attended [tokens, rank] · w_uvᵀ, w_uv [width, rank]. */
void release_values(const float *attended, int64_t token_stride, int64_t head_stride, const float *w_uv,
                    int64_t w_stride, float *out, int64_t tokens, int64_t heads, int64_t width, int64_t rank)
{
#pragma omp parallel for schedule(static) if (tokens * heads * width * rank > SMALL_WORK)
    for (int64_t h = 0; h < heads; h++)
        for (int64_t v = 0; v < width; v += 4)
            multiply_rows(attended + h * head_stride, token_stride, tokens, w_uv + h * w_stride + v * rank, rank, rank,
                          out + h * width + v, heads * width, width - v < 4 ? width - v : 4);
}
