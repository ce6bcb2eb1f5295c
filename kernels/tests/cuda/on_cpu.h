// The kernels' surroundings on a CPU: one block after another, with a thread of the system for each of its threads.
#pragma once
#include <pthread.h>
#include <string.h>

typedef struct {
    void (*run)(const void *);
    const void *arguments;
    pthread_barrier_t *barrier;
    u32 thread, threads, block, blocks;
} Seat;

static _Thread_local const Seat *seat;

#define KERNEL static void
#define DEVICE static inline
#define SHARED static
#define THREAD (seat->thread)
#define THREADS (seat->threads)
#define BLOCK (seat->block)
#define BLOCKS (seat->blocks)
#define SYNC() (void)pthread_barrier_wait(seat->barrier)
#define ADD(at, value) __atomic_fetch_add(at, value, __ATOMIC_RELAXED)
#define MIN(at, value) lower(at, value)
#define F_ADD(a, b) ((a) + (b))
#define F_MUL(a, b) ((a) * (b))
#define F_DIV(a, b) ((a) / (b))
#define D_ADD(a, b) ((a) + (b))
#define FLOAT_BITS(x) float_bits(x)
#define BITS_FLOAT(x) bits_float(x)
#define DOUBLE_BITS(x) double_bits(x)
#define MUL_HIGH(a, b) ((u64)((unsigned __int128)(a) * (b) >> 64))

static inline u32 float_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float bits_float(u32 bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline u64 double_bits(double x) {
    u64 bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline void lower(u32 *at, u32 value) {
    u32 now = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (value < now && !__atomic_compare_exchange_n(at, &now, value, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

static void *take_seat(void *given) {
    seat = given;
    seat->run(seat->arguments);
    return NULL;
}

static void launch(void (*run)(const void *), const void *arguments, u32 blocks, u32 threads) {
    pthread_t handles[threads];
    Seat seats[threads];
    pthread_barrier_t barrier;
    for (u32 block = 0; block < blocks; block += 1) {
        pthread_barrier_init(&barrier, NULL, threads);
        for (u32 thread = 0; thread < threads; thread += 1) {
            seats[thread] = (Seat){run, arguments, &barrier, thread, threads, block, blocks};
            pthread_create(&handles[thread], NULL, take_seat, &seats[thread]);
        }
        for (u32 thread = 0; thread < threads; thread += 1) pthread_join(handles[thread], NULL);
        pthread_barrier_destroy(&barrier);
    }
}
