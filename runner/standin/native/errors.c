// Errors: the last one of each thread, and their names.
#include "standin.h"

static __thread int last_error;

int failed_with(int error) {
    if (error) last_error = error;
    return error;
}
int cudaGetLastError(void) {
    int error = last_error;
    last_error = 0;
    return error;
}
int cudaPeekAtLastError(void) { return last_error; }

static const struct {
    int error;
    const char *runtime, *driver, *words;
} errors[] = {
    {SUCCESS, "cudaSuccess", "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "cudaErrorInvalidValue", "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {INITIALIZATION_ERROR, "cudaErrorInitializationError", "CUDA_ERROR_NOT_INITIALIZED",
     "initialization error"},
    {NO_DEVICE, "cudaErrorNoDevice", "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "cudaErrorInvalidDevice", "CUDA_ERROR_INVALID_DEVICE",
     "invalid device ordinal"},
    {INVALID_IMAGE, "cudaErrorInvalidKernelImage", "CUDA_ERROR_INVALID_IMAGE",
     "device kernel image is invalid"},
    {FILE_NOT_FOUND, "cudaErrorFileNotFound", "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {INVALID_HANDLE, "cudaErrorInvalidResourceHandle", "CUDA_ERROR_INVALID_HANDLE",
     "invalid resource handle"},
    {NOT_FOUND, "cudaErrorSymbolNotFound", "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_SUPPORTED, "cudaErrorNotSupported", "CUDA_ERROR_NOT_SUPPORTED",
     "operation not supported by the stand-in GPU"},
    {CAPTURE_UNSUPPORTED, "cudaErrorStreamCaptureUnsupported",
     "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
};
static int error_row(int error) {
    for (int i = 0; i < (int)(sizeof errors / sizeof *errors); i++)
        if (errors[i].error == error) return i;
    return -1;
}
const char *cudaGetErrorName(int error) {
    int row = error_row(error);
    return row < 0 ? "unrecognized error code" : errors[row].runtime;
}
const char *cudaGetErrorString(int error) {
    int row = error_row(error);
    return row < 0 ? "unrecognized error code" : errors[row].words;
}
int cuGetErrorName(int error, const char **text) {
    int row = error_row(error);
    *text = row < 0 ? NULL : errors[row].driver;
    return row < 0 ? INVALID_VALUE : SUCCESS;
}
int cuGetErrorString(int error, const char **text) {
    int row = error_row(error);
    *text = row < 0 ? NULL : errors[row].words;
    return row < 0 ? INVALID_VALUE : SUCCESS;
}
