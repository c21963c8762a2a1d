#include <stdlib.h>

#include "../native.h"

#define CHUNK_ROWS 64 /* of an expert's tokens at a time: what lies between its products stays in the caches */

/* The experts one after the other, each with all its tokens; a token's experts add up in the order of their ids.

   scratch: CHUNK_ROWS · (2 h + 3 I) floats; places: experts + tokens · top_k integers. */
void moe_experts(const float *x, const float *w_gate_up, const float *w_down, const float *topk_weights,
                 const int64_t *topk_ids, float *out, float *scratch, int64_t *places, int64_t tokens, int64_t top_k,
                 int64_t experts, int64_t h, int64_t inter)
{
    const int64_t pairs = tokens * top_k;
    int64_t *const ends = places, *const order = places + experts;
    memset(out, 0, sizeof(float) * tokens * h);
    memset(ends, 0, sizeof(int64_t) * experts);
    for (int64_t pair = 0; pair < pairs; pair++)
        if (topk_ids[pair] >= 0)
            ends[topk_ids[pair]]++;
    for (int64_t expert = 0, start = 0; expert < experts; expert++) {
        const int64_t count = ends[expert];
        ends[expert] = start;
        start += count;
    }
    for (int64_t pair = 0; pair < pairs; pair++)
        if (topk_ids[pair] >= 0)
            order[ends[topk_ids[pair]]++] = pair;
    float *const rows = scratch, *const gate_up = rows + CHUNK_ROWS * h, *const act = gate_up + CHUNK_ROWS * 2 * inter;
    float *const result = act + CHUNK_ROWS * inter;
    for (int64_t expert = 0, start = 0; expert < experts; expert++)
        for (int64_t count; start < ends[expert]; start += count) {
            count = ends[expert] - start < CHUNK_ROWS ? ends[expert] - start : CHUNK_ROWS;
            const int64_t *const mine = order + start;
            for (int64_t i = 0; i < count; i++)
                memcpy(rows + i * h, x + mine[i] / top_k * h, sizeof(float) * h);
            multiply(rows, h, count, w_gate_up + expert * 2 * inter * h, h, 2 * inter, h, gate_up, 2 * inter);
            for (int64_t i = 0; i < count; i++)
                swiglu(gate_up + i * 2 * inter, gate_up + i * 2 * inter + inter, act + i * inter, inter);
            multiply(act, inter, count, w_down + expert * h * inter, inter, h, inter, result, h);
            for (int64_t i = 0; i < count; i++) {
                float *const sum = out + mine[i] / top_k * h;
                for (int64_t c = 0; c < h; c++)
                    sum[c] += result[i * h + c] * topk_weights[mine[i]];
            }
        }
}
