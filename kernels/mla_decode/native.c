#include "../native.h"

#define TILE_ROWS 16  /* (query, head) rows that share one pass over the keys */
#define SPAN_KEYS 128 /* keys between two corrections of the running softmax */

typedef struct {
    const float *q_latent, *q_rope, *kv_cache;
    const int32_t *block_table;
    const uint8_t *mask; /* [tokens, mask_width], or NULL: causal */
    int64_t mask_width, heads, rank, rope, block_size, max_blocks;
    float scale;
} Attention;

INLINE int sees(const Attention *a, int64_t token, int64_t query, int64_t key, int64_t length, int64_t new_tokens)
{
    const int64_t relative = key - (length - new_tokens);
    return relative < 0 || (a->mask ? a->mask[token * a->mask_width + relative] : relative <= query);
}

/* Rows first_row … of one request's new tokens · heads, by a softmax that runs over spans of keys. */
static void attend(const Attention *a, int64_t request, int64_t first_token, int64_t new_tokens, int64_t length,
                   int64_t first_row, int64_t rows, float *out, float *lse, float *query, float *scores)
{
    const int64_t width = a->rank + a->rope;
    const int32_t *const table = a->block_table + request * a->max_blocks;
    float highest[TILE_ROWS], total[TILE_ROWS];
    out += (first_token * a->heads + first_row) * a->rank;
    lse += first_token * a->heads + first_row;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t row = first_token * a->heads + first_row + r;
        for (int64_t i = 0; i < a->rank; i++)
            query[r * width + i] = a->q_latent[row * a->rank + i] * a->scale;
        for (int64_t i = 0; i < a->rope; i++)
            query[r * width + a->rank + i] = a->q_rope[row * a->rope + i] * a->scale;
        highest[r] = -INFINITY;
        total[r] = 0.0f;
    }
    memset(out, 0, sizeof(float) * rows * a->rank);
    const int64_t last_query = (first_row + rows - 1) / a->heads;
    const int64_t end = a->mask ? length : length - new_tokens + last_query + 1;
    const int64_t span = SPAN_KEYS / a->block_size > 0 ? SPAN_KEYS / a->block_size * a->block_size : SPAN_KEYS;
    for (int64_t start = 0; start < end; start += span) {
        const int64_t count = end - start < span ? end - start : span;
        for (int64_t key = 0, step; key < count; key += step) {
            const int64_t position = start + key, offset = position % a->block_size;
            step = a->block_size - offset < count - key ? a->block_size - offset : count - key;
            const float *const keys = a->kv_cache + (table[position / a->block_size] * a->block_size + offset) * width;
            for (int64_t n = 0; n < step; n += 4)
                multiply_rows(query, width, rows, keys + n * width, width, width, scores + key + n, SPAN_KEYS,
                              step - n < 4 ? step - n : 4);
        }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t of_request = (first_row + r) / a->heads;
            float *const own = scores + r * SPAN_KEYS, before = highest[r], sum = 0.0f;
            for (int64_t key = length - new_tokens > start ? length - new_tokens - start : 0; key < count; key++)
                if (!sees(a, first_token + of_request, of_request, start + key, length, new_tokens))
                    own[key] = -INFINITY;
            float most = before;
            for (int64_t key = 0; key < count; key++)
                most = own[key] > most || isnan(own[key]) ? own[key] : most;
            if (most == -INFINITY) {
                memset(own, 0, sizeof(float) * count);
                continue;
            }
            for (int64_t key = 0; key < count; key++)
                own[key] = own[key] == -INFINITY ? 0.0f : exponential(own[key] - most);
#pragma omp simd reduction(+ : sum)
            for (int64_t key = 0; key < count; key++)
                sum += own[key];
            if (most != before) {
                const float factor = before == -INFINITY ? 0.0f : exponential(before - most);
                total[r] *= factor;
                for (int64_t c = 0; c < a->rank; c++)
                    out[r * a->rank + c] *= factor;
            }
            highest[r] = most;
            total[r] += sum;
        }
        for (int64_t key = 0, step; key < count; key += step) {
            const int64_t position = start + key, offset = position % a->block_size;
            step = a->block_size - offset < count - key ? a->block_size - offset : count - key;
            const float *const keys = a->kv_cache + (table[position / a->block_size] * a->block_size + offset) * width;
            add_products(rows, scores + key, SPAN_KEYS, keys, width, step, a->rank, out, a->rank);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        lse[r] = highest[r] == -INFINITY ? -INFINITY : logf(total[r]) + highest[r];
        for (int64_t c = 0; c < a->rank && total[r] != 0.0f; c++)
            out[r * a->rank + c] /= total[r];
    }
}

/* scratch: of each thread TILE_ROWS · (rank + rope + SPAN_KEYS) floats. */
void mla_decode(const float *q_latent, const float *q_rope, const float *kv_cache, const int32_t *block_table,
                const int32_t *cache_seqlens, const int32_t *cu_seqlens_q, const uint8_t *mask, float *out, float *lse,
                float *scratch, int64_t requests, int64_t heads, int64_t rank, int64_t rope, int64_t block_size,
                int64_t max_blocks, int64_t mask_width, int64_t most_tiles, float scale)
{
    const Attention a = {q_latent, q_rope, kv_cache, block_table, mask, mask_width, heads, rank, rope, block_size,
                         max_blocks, scale};
    const int64_t of_thread = TILE_ROWS * (rank + rope + SPAN_KEYS);
    int64_t work = 0;
    for (int64_t request = 0; request < requests; request++)
        work += (int64_t)cache_seqlens[request] * (cu_seqlens_q[request + 1] - cu_seqlens_q[request]) * heads * rank;
#pragma omp parallel for schedule(dynamic) if (work > SMALL_WORK)
    for (int64_t tile = 0; tile < requests * most_tiles; tile++) {
        const int64_t request = tile / most_tiles, first_row = tile % most_tiles * TILE_ROWS;
        const int64_t first = cu_seqlens_q[request], new_tokens = cu_seqlens_q[request + 1] - first;
        const int64_t left = new_tokens * heads - first_row;
        float *const own = scratch + of_thread * thread_number();
        if (left > 0)
            attend(&a, request, first, new_tokens, cache_seqlens[request], first_row,
                   left < TILE_ROWS ? left : TILE_ROWS, out, lse, own, own + TILE_ROWS * (rank + rope));
    }
}
