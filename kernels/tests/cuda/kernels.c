// The kernels as functions that tests call.
#include "../../cuda/kv.cu"
#include "../../cuda/sampler.cu"

#define EXPORT __attribute__((visibility("default")))

typedef struct {
    const u8 *from;
    u8 *into;
    Pieces of;
} KvArguments;

static void gather(const void *given) {
    const KvArguments *a = given;
    kv_gather(a->from, a->into, a->of);
}

static void scatter(const void *given) {
    const KvArguments *a = given;
    kv_scatter(a->from, a->into, a->of);
}

EXPORT void run_kv_gather(const u8 *arena, u8 *staging, const Pieces *of, u32 pieces, u32 threads) {
    const KvArguments arguments = {arena, staging, *of};
    launch(gather, &arguments, pieces, threads);
}

EXPORT void run_kv_scatter(const u8 *staging, u8 *arena, const Pieces *of, u32 pieces, u32 threads) {
    const KvArguments arguments = {staging, arena, *of};
    launch(scatter, &arguments, pieces, threads);
}

typedef struct {
    float *logits;
    u32 vocab, stride;
    const Draw *draws;
    u32 *tokens;
} SampleArguments;

static void sample_rows(const void *given) {
    const SampleArguments *a = given;
    sample(a->logits, a->vocab, a->stride, a->draws, a->tokens);
}

EXPORT void run_sample(float *logits, u32 vocab, u32 stride, const Draw *draws, u32 *tokens, u32 rows, u32 threads) {
    const SampleArguments arguments = {logits, vocab, stride, draws, tokens};
    launch(sample_rows, &arguments, rows, threads);
}
