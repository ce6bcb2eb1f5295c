// What the kernels ask of whatever runs them. They are plain C, so that a GPU runs them (compiled by NVRTC), and also any C
// compiler's output, one block after another with a thread for each of its threads: the tests do that where there is no GPU.
#pragma once

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ __forceinline__
#define SHARED __shared__
#define THREAD threadIdx.x
#define THREADS blockDim.x
#define BLOCK blockIdx.x
#define BLOCKS gridDim.x
#define SYNC() __syncthreads()
#define ADD(at, value) atomicAdd(at, value)
#define MIN(at, value) atomicMin(at, value)
// None of these is ever joined into a fused multiply-add, which rounds otherwise.
#define F_ADD(a, b) __fadd_rn(a, b)
#define F_MUL(a, b) __fmul_rn(a, b)
#define F_DIV(a, b) __fdiv_rn(a, b)
#define D_ADD(a, b) __dadd_rn(a, b)
#define FLOAT_BITS(x) __float_as_uint(x)
#define BITS_FLOAT(x) __uint_as_float(x)
#define DOUBLE_BITS(x) ((u64)__double_as_longlong(x))
#define MUL_HIGH(a, b) __umul64hi(a, b)
#else
#include "on_cpu.h"
#endif
