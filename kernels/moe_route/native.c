#include "../native.h"

enum { GREEDY, GROUP_LIMITED_GREEDY, NOAUX_TC };

/* The first of the largest values that are not taken yet. A NaN counts as the largest, as it does for torch. */
static int64_t take_largest(const float *values, uint8_t *taken, int64_t count)
{
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || values[i] > values[best] || (isnan(values[i]) && !isnan(values[best]))))
            best = i;
    taken[best] = 1;
    return best;
}

static void score(const float *logits, int softmax, float *scores, int64_t experts)
{
    float highest = -INFINITY, sum = 0.0f;
    if (!softmax) {
        for (int64_t e = 0; e < experts; e++)
            scores[e] = 1.0f / (1.0f + exponential(-logits[e]));
        return;
    }
    for (int64_t e = 0; e < experts; e++)
        highest = logits[e] > highest || isnan(logits[e]) ? logits[e] : highest;
    for (int64_t e = 0; e < experts; e++)
        sum += scores[e] = exponential(logits[e] - highest);
    for (int64_t e = 0; e < experts; e++)
        scores[e] /= sum;
}

/* Takes the experts of all groups but the `topk_group` best ones. */
static void leave_groups(const float *choice, int method, int64_t experts, int64_t n_group, int64_t topk_group,
                         float *best, uint8_t *kept, uint8_t *taken)
{
    const int64_t size = experts / n_group;
    for (int64_t group = 0; group < n_group; group++) {
        memset(kept, 0, size);
        const float *const own = choice + group * size;
        best[group] = own[take_largest(own, kept, size)];
        if (method == NOAUX_TC)
            best[group] += own[take_largest(own, kept, size)];
    }
    memset(kept, 0, n_group);
    for (int64_t i = 0; i < topk_group; i++)
        take_largest(best, kept, n_group);
    for (int64_t group = 0; group < n_group; group++)
        memset(taken + group * size, !kept[group], size);
}

/* scratch: 3 · experts floats and 2 · experts bytes. bias may be NULL. */
void moe_route(const float *logits, const float *bias, float *weights, int64_t *ids, float *scratch, int64_t tokens,
               int64_t experts, int64_t method, int64_t softmax, int64_t top_k, int64_t n_group, int64_t topk_group,
               int64_t renormalize, float scaling)
{
    float *const scores = scratch, *const choice = scores + experts, *const best = choice + experts;
    uint8_t *const taken = (uint8_t *)(best + experts), *const kept = taken + experts;
    for (int64_t token = 0; token < tokens; token++, logits += experts, weights += top_k, ids += top_k) {
        float sum = 0.0f;
        score(logits, softmax, scores, experts);
        for (int64_t e = 0; e < experts; e++)
            choice[e] = bias ? scores[e] + bias[e] : scores[e];
        memset(taken, 0, experts);
        if (method != GREEDY && n_group > 1)
            leave_groups(choice, method, experts, n_group, topk_group, best, kept, taken);
        for (int64_t k = 0; k < top_k; k++) {
            ids[k] = take_largest(choice, taken, experts);
            weights[k] = scores[ids[k]];
            sum += weights[k];
        }
        for (int64_t k = 0; k < top_k; k++) {
            if (renormalize)
                weights[k] /= sum + 1e-20f;
            if (method == NOAUX_TC || !renormalize)
                weights[k] *= scaling;
        }
    }
}
