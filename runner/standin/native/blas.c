// cuBLAS: handles are ours, products leave their output as it is. Descriptors of cublasLt are plain
// structures of the host and stay the real library's (build.py leaves their names alone).
#include "standin.h"
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

enum { BLAS_ALLOC_FAILED = 3 };
typedef struct {
    void *stream;
    int math, pointer, atomics, sms;
} Handle;

int cublasCreate_v2(void **handle) {
    *handle = calloc(1, sizeof(Handle));
    return *handle ? SUCCESS : BLAS_ALLOC_FAILED;
}
int cublasDestroy_v2(void *handle) {
    free(handle);
    return SUCCESS;
}
int cublasLtCreate(void **handle) { return cublasCreate_v2(handle); }
int cublasLtDestroy(void *handle) { return cublasDestroy_v2(handle); }
int cublasGetVersion_v2(void *handle, int *version) {
    size_t (*real)(void) = (size_t (*)(void))dlsym(RTLD_DEFAULT, "cublasLtGetVersion");
    *version = real ? (int)real() : 0;
    return SUCCESS;
}

int cublasSetStream_v2(Handle *handle, void *stream) {
    handle->stream = stream;
    return SUCCESS;
}
int cublasGetStream_v2(Handle *handle, void **stream) {
    *stream = handle->stream;
    return SUCCESS;
}
int cublasSetMathMode(Handle *handle, int mode) {
    handle->math = mode;
    return SUCCESS;
}
int cublasGetMathMode(Handle *handle, int *mode) {
    *mode = handle->math;
    return SUCCESS;
}
int cublasSetPointerMode_v2(Handle *handle, int mode) {
    handle->pointer = mode;
    return SUCCESS;
}
int cublasGetPointerMode_v2(Handle *handle, int *mode) {
    *mode = handle->pointer;
    return SUCCESS;
}
int cublasSetAtomicsMode(Handle *handle, int mode) {
    handle->atomics = mode;
    return SUCCESS;
}
int cublasGetAtomicsMode(Handle *handle, int *mode) {
    *mode = handle->atomics;
    return SUCCESS;
}
int cublasSetSmCountTarget(Handle *handle, int sms) {
    handle->sms = sms;
    return SUCCESS;
}
int cublasGetSmCountTarget(Handle *handle, int *sms) {
    *sms = handle->sms;
    return SUCCESS;
}
int cublasSetWorkspace_v2(void) { return SUCCESS; }
int cublasSetEmulationStrategy(void) { return SUCCESS; }
int cublasSetEnvironmentMode(void) { return SUCCESS; }

// ---- products: one more piece of work in the handle's stream

#define PRODUCT(name)                                                                              \
    int name(Handle *handle) {                                                                     \
        note_work(handle->stream);                                                                 \
        return SUCCESS;                                                                            \
    }
#define REAL(name) PRODUCT(cublasS##name) PRODUCT(cublasD##name)
#define REAL_OR_COMPLEX(name) REAL(name) PRODUCT(cublasC##name) PRODUCT(cublasZ##name)

REAL_OR_COMPLEX(gemm_v2)
REAL_OR_COMPLEX(gemm_v2_64)
REAL_OR_COMPLEX(gemmBatched)
REAL_OR_COMPLEX(gemmStridedBatched)
REAL_OR_COMPLEX(gemmStridedBatched_64)
REAL_OR_COMPLEX(gemv_v2)
REAL_OR_COMPLEX(gemv_v2_64)
REAL_OR_COMPLEX(gemvStridedBatched_64)
REAL_OR_COMPLEX(trsm_v2)
REAL_OR_COMPLEX(trsm_v2_64)
REAL_OR_COMPLEX(trsmBatched)
REAL_OR_COMPLEX(getrfBatched)
REAL_OR_COMPLEX(geam)
REAL_OR_COMPLEX(dgmm)
REAL(dot_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasDotEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmEx_64)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasGemmStridedBatchedEx_64)

// These write the caller's `info`, on the host: no error.
#define SOLVED(name, ...)                                                                          \
    int name(__VA_ARGS__) {                                                                        \
        *info = 0;                                                                                 \
        return SUCCESS;                                                                            \
    }
#define GETRS(letter)                                                                              \
    SOLVED(cublas##letter##getrsBatched, void *handle, int op, int n, int rhs, void *a, int lda,   \
           void *pivots, void *b, int ldb, int *info)
#define GEQRF(letter)                                                                              \
    SOLVED(cublas##letter##geqrfBatched, void *handle, int m, int n, void *a, int lda, void *tau,  \
           int *info)
GETRS(S)
GETRS(D)
GETRS(C)
GETRS(Z)
GEQRF(S)
GEQRF(D)
GEQRF(C) GEQRF(Z)

    // ---- cublasLt

    typedef struct {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} Heuristic;

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c,
                                   void *d, void *preference, int wanted, Heuristic *out,
                                   int *got) {
    *got = wanted > 0;
    if (*got) memset(out, 0, sizeof *out);
    return SUCCESS;
}
int cublasLtMatmul(void *handle, void *operation, const void *alpha, const void *a, void *a_layout,
                   const void *b, void *b_layout, const void *beta, const void *c, void *c_layout,
                   void *d, void *d_layout, const void *algorithm, void *workspace, size_t bytes,
                   void *stream) {
    note_work(stream);
    return SUCCESS;
}
