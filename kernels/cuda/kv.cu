// KV between the arena and memory of the host that the GPU reaches, piece by piece. The pieces and their order are those of
// `KvLayout::pieces`. For pieces too short for the copy engines.
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
