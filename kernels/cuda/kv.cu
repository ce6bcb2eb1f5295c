// KV between the arena, where the positions of each head lie side by side, and staging, where the pieces of a read follow each
// other. The pieces and their order are those of `KvLayout::pieces`.
#include "kernel.h"

// What is moved at once. Offsets, strides and lengths are multiples of it.
typedef struct {
    u32 words[4];
} __attribute__((aligned(16))) Vector;

typedef struct {
    u64 first;        // Bytes from the arena's start to the first piece.
    u64 plane_stride; // Bytes from a plane to the next ...
    u64 head_stride;  // ... and from a head to the next.
    u32 heads;        // Of each plane.
    u32 piece;        // Bytes of a piece.
} Pieces;

DEVICE u64 piece_at(Pieces of, u32 number) {
    return of.first + number / of.heads * of.plane_stride + number % of.heads * of.head_stride;
}

// A block for each piece.
KERNEL kv_gather(const u8 *arena, u8 *staging, Pieces of) {
    const Vector *from = (const Vector *)(arena + piece_at(of, BLOCK));
    Vector *into = (Vector *)(staging + (u64)BLOCK * of.piece);
    for (u32 at = THREAD; at < of.piece / sizeof(Vector); at += THREADS) into[at] = from[at];
}

// A block for each piece.
KERNEL kv_scatter(const u8 *staging, u8 *arena, Pieces of) {
    const Vector *from = (const Vector *)(staging + (u64)BLOCK * of.piece);
    Vector *into = (Vector *)(arena + piece_at(of, BLOCK));
    for (u32 at = THREAD; at < of.piece / sizeof(Vector); at += THREADS) into[at] = from[at];
}
