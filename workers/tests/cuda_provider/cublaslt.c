// A stand-in for libcublasLt.so.13: products that compute nothing.
#include <stddef.h>
#include <string.h>

#define SUCCEEDS(name)                                                                                                 \
    int name(void) { return 0; }
#define MAKES(name)                                                                                                    \
    int name(void **made) { return *made = (void *)16, 0; }

// One algorithm, whatever is asked for.
int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference, int most, void *found, int *count
) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)most;
    return memset(found, 0, 64), *count = 1, 0;
}

SUCCEEDS(cublasLtMatmul)
MAKES(cublasLtCreate)
SUCCEEDS(cublasLtDestroy)
SUCCEEDS(cublasLtMatmulAlgoConfigSetAttribute)
SUCCEEDS(cublasLtMatmulAlgoInit)
MAKES(cublasLtMatmulDescCreate)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
MAKES(cublasLtMatmulPreferenceCreate)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
MAKES(cublasLtMatrixLayoutCreate)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatrixTransform)
MAKES(cublasLtMatrixTransformDescCreate)
SUCCEEDS(cublasLtMatrixTransformDescDestroy)
