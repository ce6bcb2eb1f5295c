// A stand-in for libcublas.so.13: products that compute nothing.
#include <stddef.h>
#include <string.h>

#define SUCCEEDS(name)                                                                                                 \
    int name(void) { return 0; }
#define MAKES(name)                                                                                                    \
    int name(void **made) { return *made = (void *)16, 0; }

const char *cublasGetStatusName(int status) { return status ? "an error" : "success"; }
const char *cublasGetStatusString(int status) { return cublasGetStatusName(status); }
int cublasGetMathMode(void *handle, int *mode) { return (void)handle, *mode = 0, 0; }

MAKES(cublasCreate_v2)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasDgeam)
SUCCEEDS(cublasDgemmBatched)
SUCCEEDS(cublasDgemmStridedBatched)
SUCCEEDS(cublasDgemm_v2)
SUCCEEDS(cublasDgetrfBatched)
SUCCEEDS(cublasDgetriBatched)
SUCCEEDS(cublasGemmBatchedEx)
SUCCEEDS(cublasGemmEx)
SUCCEEDS(cublasGemmStridedBatchedEx)
SUCCEEDS(cublasScopy_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSgeam)
SUCCEEDS(cublasSgemmBatched)
SUCCEEDS(cublasSgemmStridedBatched)
SUCCEEDS(cublasSgemm_v2)
SUCCEEDS(cublasSgetrfBatched)
SUCCEEDS(cublasSgetriBatched)
SUCCEEDS(cublasSscal_v2)
