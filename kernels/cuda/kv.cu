// KV between the arena and other memory that the GPU reaches, piece by piece: pieces too short for the copy engines, and those of other
// processes' arenas; and sums of KV in the arena. The pieces and their order are those of `KvLayout::pieces`.
#include "kernel.h"

// What is moved at once. Offsets, strides and lengths are multiples of it.
typedef struct {
    u32 words[4];
} __attribute__((aligned(16))) Vector;

typedef struct {
    u64 first;        // Bytes from the start of the memory to the first piece.
    u64 plane_stride; // Bytes from a plane to the next ...
    u64 head_stride;  // ... and from a head to the next.
    u32 heads;        // Of each plane.
    u32 piece;        // Bytes of a piece.
} Pieces;

DEVICE u64 piece_at(Pieces of, u32 number) {
    return of.first + number / of.heads * of.plane_stride + number % of.heads * of.head_stride;
}

// A block for each piece. The pieces of both sides are equal in number and length.
KERNEL kv_copy(const u8 *from, Pieces out, u8 *into, Pieces in) {
    const Vector *source = (const Vector *)(from + piece_at(out, BLOCK));
    Vector *target = (Vector *)(into + piece_at(in, BLOCK));
    for (u32 at = THREAD; at < out.piece / sizeof(Vector); at += THREADS) target[at] = source[at];
}

// CRC-64/NVME's polynomial, without its x^64, and so also what x^64 is. The highest bit of a word is the coefficient of x^0.
#define POLYNOMIAL 0x9a6c9329ac4bc9b5ull

// Threads of a block that sums, at most; a power of two.
#define SUMMERS_MAX 256

// x^(128 · 2^n), for n from 0.
typedef struct {
    u64 of[9];
} Powers;

DEVICE u64 times_x(u64 a) {
    return a >> 1 ^ (a & 1 ? POLYNOMIAL : 0);
}

DEVICE u64 times(u64 a, u64 b) {
    u64 product = 0;
    for (; a; a <<= 1, b = times_x(b))
        if (a >> 63) product ^= b;
    return product;
}

// The product with the factor that a table is of.
DEVICE u64 times_factor(const u64 (*table)[256], u64 a) {
    u64 product = 0;
    for (u32 byte = 0; byte < 8; byte += 1) product ^= table[byte][a >> 8 * byte & 255];
    return product;
}

// The sums of `count` stretches of pieces, as `stretch_sums` in `crc.rs` has them. Each stretch is one block's: a row of as many
// vectors as there are threads after another, and at last what the threads have is added up, neighbours first.
KERNEL kv_sum(const u8 *from, Pieces of, u32 count, u32 stretch, Powers powers, u64 *sums) {
    SHARED u64 table[8][256], bits[64], parts[SUMMERS_MAX];
    u32 steps = 0;
    while (1u << steps < THREADS) steps += 1;
    // A row further on, what came before counts as multiplied by this.
    u64 factor = powers.of[steps];
    for (u32 bit = 64; THREAD == 0 && bit > 0; bit -= 1, factor = times_x(factor)) bits[bit - 1] = factor;
    SYNC();
    for (u32 at = THREAD; at < 8 * 256; at += THREADS) {
        u64 product = 0;
        for (u32 bit = 0; bit < 8; bit += 1)
            if (at >> bit & 1) product ^= bits[at / 256 * 8 + bit];
        table[at / 256][at % 256] = product;
    }
    SYNC();
    const u32 stretches = (of.piece + stretch - 1) / stretch;
    for (u32 number = BLOCK; number < count; number += BLOCKS) {
        const u32 start = number % stretches * stretch, rest = of.piece - start;
        const u32 vectors = (rest < stretch ? rest : stretch) / sizeof(Vector);
        const Vector *source = (const Vector *)(from + piece_at(of, number / stretches) + start);
        // The first row is the one that need not be full: zeros in front change nothing.
        const u32 before = (THREADS - vectors % THREADS) % THREADS;
        u64 even = 0, odd = 0;
        for (u32 at = THREAD; at < before + vectors; at += THREADS) {
            even = times_factor(table, even);
            odd = times_factor(table, odd);
            if (at < before) continue;
            const Vector vector = source[at - before];
            even ^= vector.words[0] | (u64)vector.words[1] << 32;
            odd ^= vector.words[2] | (u64)vector.words[3] << 32;
        }
        parts[THREAD] = times(even, POLYNOMIAL) ^ odd;
        for (u32 step = 0; step < steps; step += 1) {
            SYNC();
            const u32 left = THREAD << (step + 1);
            if (left < THREADS) parts[left] = times(parts[left], powers.of[step]) ^ parts[left + (1u << step)];
        }
        if (THREAD == 0) sums[number] = parts[0];
        SYNC();
    }
}
