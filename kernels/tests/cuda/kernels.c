// The kernels with their parameters as a launch hands them over: an array of pointers, one to each.
#include "../../cuda/adjust.cu"
#include "../../cuda/kv.cu"
#include "../../cuda/sampler.cu"

typedef struct {
    const char *name;
    // Takes the parameters over, as they are only there during the launch.
    void *(*take)(void **parameters);
    void (*run)(const void *taken);
} Kernel;

typedef struct {
    const u8 *from;
    Pieces out;
    u8 *into;
    Pieces in;
} KvCopy;

static void *take_kv_copy(void **given) {
    KvCopy *taken = malloc(sizeof *taken);
    *taken = (KvCopy){*(const u8 **)given[0], *(Pieces *)given[1], *(u8 **)given[2], *(Pieces *)given[3]};
    return taken;
}

static void run_kv_copy(const void *given) {
    const KvCopy *a = given;
    kv_copy(a->from, a->out, a->into, a->in);
}

typedef struct {
    const u8 *from;
    Pieces of;
    u32 count, stretch;
    Powers powers;
    u64 *sums;
} KvSum;

static void *take_kv_sum(void **given) {
    KvSum *taken = malloc(sizeof *taken);
    *taken = (KvSum){*(const u8 **)given[0], *(Pieces *)given[1],  *(u32 *)given[2],
                     *(u32 *)given[3],       *(Powers *)given[4], *(u64 **)given[5]};
    return taken;
}

static void run_kv_sum(const void *given) {
    const KvSum *a = given;
    kv_sum(a->from, a->of, a->count, a->stretch, a->powers, a->sums);
}

typedef struct {
    float *logits;
    u32 vocab;
    const Draw *draws;
    u32 *tokens;
} Sample;

static void *take_sample(void **given) {
    Sample *taken = malloc(sizeof *taken);
    *taken = (Sample){*(float **)given[0], *(u32 *)given[1], *(const Draw **)given[2], *(u32 **)given[3]};
    return taken;
}

static void run_sample(const void *given) {
    const Sample *a = given;
    sample(a->logits, a->vocab, a->draws, a->tokens);
}

typedef struct {
    float *logits;
    u32 vocab;
    const RowAdjustment *rows;
    const TokenAdjustment *tokens;
    const u32 *masks;
} Adjust;

static void *take_adjust(void **given) {
    Adjust *taken = malloc(sizeof *taken);
    *taken = (Adjust){
        *(float **)given[0], *(u32 *)given[1], *(const RowAdjustment **)given[2], *(const TokenAdjustment **)given[3],
        *(const u32 **)given[4]};
    return taken;
}

static void run_adjust(const void *given) {
    const Adjust *a = given;
    adjust(a->logits, a->vocab, a->rows, a->tokens, a->masks);
}

typedef struct {
    const float *logits;
    u32 vocab;
    const Told *rows;
    u32 width;
    const u32 *drawn;
    Normalizer *normalizers;
    Probable *probable;
} Probabilities;

static void *take_probabilities(void **given) {
    Probabilities *taken = malloc(sizeof *taken);
    *taken = (Probabilities){
        *(const float **)given[0], *(u32 *)given[1],         *(const Told **)given[2], *(u32 *)given[3],
        *(const u32 **)given[4],   *(Normalizer **)given[5], *(Probable **)given[6]};
    return taken;
}

static void run_probabilities(const void *given) {
    const Probabilities *a = given;
    probabilities(a->logits, a->vocab, a->rows, a->width, a->drawn, a->normalizers, a->probable);
}

static const Kernel kernels[] = {
    {"adjust", take_adjust, run_adjust},
    {"probabilities", take_probabilities, run_probabilities},
    {"kv_copy", take_kv_copy, run_kv_copy},
    {"kv_sum", take_kv_sum, run_kv_sum},
    {"sample", take_sample, run_sample},
};
