// Draws the next token of each row, exactly as `kernels/src/sampler.rs` does: the same bits of every weight, and sums
// of whole numbers, which are the same in any order.
#include "weights.h"

#define DIGIT_BITS 8
#define DIGITS (1 << DIGIT_BITS)
#define NOT_FINITE 0xffffffffu // Instead of a token.

// How a row's token is drawn.
typedef struct {
    float temperature; // 0: the largest logit, the first of equals.
    u32 top_k;         // 0: all.
    u64 top_p;         // Parts in 2^32; 2^32: all.
    u64 random;        // The request's random bits for this token.
    float min_p;       // Parts of the largest weight; 0: all.
} Draw;

// Which tokens are kept: those that weigh more than the least one, and the first `ties` of its weight.
typedef struct {
    u32 least; // Bits of its weight: as weights are not negative, these are in the same order.
    u32 ties;
} Cut;

// What the threads of a block tell each other.
typedef struct {
    Together together;
    u64 bins[DIGITS];
    u64 above;
    u32 digit;
    u32 first;
} Board;

// What a nucleus must reach: `part` / 2^32 of a mass, rounded down, and at least 1.
DEVICE u64 nucleus(u64 whole, u64 part) {
    const u64 product = MUL_HIGH(whole, part) << 32 | whole * part >> 32;
    return product > 0 ? product : 1;
}

// Of what `within` keeps, the most probable tokens that together reach `target`: in mass, or in number. The least weight among
// them is found digit by digit.
DEVICE Cut cut(Board *board, const float *weights, u32 vocab, Cut within, u64 target, int by_mass) {
    u32 least = 0;
    u64 above = 0;
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        // The digits before are settled; none are at first.
        const u32 settled = shift + DIGIT_BITS < 32 ? 0xffffffffu << (shift + DIGIT_BITS) : 0;
        SYNC();
        for (u32 at = THREAD; at < DIGITS; at += THREADS) board->bins[at] = 0;
        SYNC();
        for (u32 id = THREAD; id < vocab; id += THREADS) {
            const u32 bits = FLOAT_BITS(weights[id]);
            if ((bits & settled) != least || bits <= within.least) continue;
            ADD(&board->bins[bits >> shift & (DIGITS - 1)], by_mass ? mass(weights[id]) : 1ull);
        }
        SYNC();
        if (THREAD == 0) {
            if ((within.least & settled) == least) {
                const u64 each = by_mass ? mass_of_bits(within.least) : 1ull;
                board->bins[within.least >> shift & (DIGITS - 1)] += within.ties * each;
            }
            u32 digit = DIGITS - 1;
            while (digit > 0 && above + board->bins[digit] < target) above += board->bins[digit--];
            board->digit = digit;
            board->above = above;
        }
        SYNC();
        above = board->above;
        least |= board->digit << shift;
    }
    const u64 each = by_mass ? mass_of_bits(least) : 1ull;
    const Cut reached = {least, each > 0 ? (u32)((target - above + each - 1) / each) : 0};
    return reached;
}

// Asked of one id after another; `ties` counts those of the least weight before.
DEVICE int is_kept(float weight, Cut cut, u32 *ties) {
    const u32 bits = FLOAT_BITS(weight);
    return bits > cut.least || (bits == cut.least && (*ties)++ < cut.ties);
}

// Draws a token for each row of `logits`, which are overwritten. A block for each row; its threads are a power of two, at most
// THREADS_MAX.
KERNEL sample(float *logits, u32 vocab, const Draw *draws, u32 *tokens) {
    SHARED Board shared;
    Board *board = &shared;
    float *weights = logits + (u64)BLOCK * vocab;
    const Draw draw = draws[BLOCK];

    Together *together = &board->together;
    int finite;
    if (THREAD == 0) board->first = vocab;
    const float largest = largest_of(together, weights, vocab, &finite);
    if (!finite) {
        if (THREAD == 0) tokens[BLOCK] = NOT_FINITE;
        return;
    }
    if (draw.temperature <= 0.0f) {
        for (u32 id = THREAD; id < vocab; id += THREADS) {
            if (weights[id] == largest) MIN(&board->first, id);
        }
        SYNC();
        if (THREAD == 0) tokens[BLOCK] = board->first;
        return;
    }

    u64 own = 0;
    for (u32 id = THREAD; id < vocab; id += THREADS) {
        weights[id] = exponential(F_DIV(F_ADD(weights[id], -largest), draw.temperature));
        own += mass(weights[id]);
    }
    u64 whole = sum_of_all(together, own);
    // All; those that weigh nothing are never drawn.
    Cut kept = {0, 0};
    if (draw.top_k > 0 && draw.top_k < vocab) {
        kept = cut(board, weights, vocab, kept, draw.top_k, 0);
        own = 0;
        for (u32 id = THREAD; id < vocab; id += THREADS) {
            if (FLOAT_BITS(weights[id]) > kept.least) own += mass(weights[id]);
        }
        whole = sum_of_all(together, own) + kept.ties * mass_of_bits(kept.least);
    }
    if (draw.top_p < 1ull << 32) kept = cut(board, weights, vocab, kept, nucleus(whole, draw.top_p), 1);

    if (draw.min_p > 0.0f && FLOAT_BITS(draw.min_p) > kept.least) {
        // More than the number before it is as much as this one.
        const Cut higher = {FLOAT_BITS(draw.min_p) - 1, 0};
        kept = higher;
    }

    // A stretch of ids for each thread.
    const u32 stretch = (vocab + THREADS - 1) / THREADS;
    const u32 begin = THREAD * stretch < vocab ? THREAD * stretch : vocab;
    const u32 end = vocab - begin < stretch ? vocab : begin + stretch;
    own = 0;
    for (u32 id = begin; id < end; id += 1) own += FLOAT_BITS(weights[id]) == kept.least;
    const u32 before = (u32)sum_before(together, own, &whole);
    u32 ties = before;
    own = 0;
    for (u32 id = begin; id < end; id += 1) {
        if (is_kept(weights[id], kept, &ties)) own += mass(weights[id]);
    }
    const u64 passed = sum_before(together, own, &whole), at = MUL_HIGH(whole, draw.random);
    if (at < passed || at - passed >= own) return;
    u64 left = at - passed;
    ties = before;
    for (u32 id = begin; id < end; id += 1) {
        if (!is_kept(weights[id], kept, &ties)) continue;
        if (left < mass(weights[id])) {
            tokens[BLOCK] = id;
            return;
        }
        left -= mass(weights[id]);
    }
}
