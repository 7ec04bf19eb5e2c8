/* A CUDA runtime without a GPU, for tests/test_fake_cuda.py: put before the real one by LD_PRELOAD, it lets PyTorch
 * believe that there is one device. Memory is the host's, copies copy, no kernel ever runs, and what is refused during
 * a capture on a GPU is refused here. So PyTorch's own code runs as on a GPU up to each launch: its checks of devices,
 * its allocator and streams, autograd's engine, and the capture of graphs, for networks of any size in no time.
 *
 * What a kernel would have computed is 0: the few numbers that are read on the host (64 bytes) are 0, a truth value is
 * true.
 *
 * Rules of a capture, as the CUDA programming guide has them ("Stream capture"), for the mode that PyTorch takes:
 * neither the host nor another stream may wait for a captured stream or event, or it for what is not captured; nothing
 * is copied from or to memory of the host that is not pinned; no thread may allocate, unless it says that it knows what
 * it does; branches join the stream where the capture began. Work given to a stream that is not captured is allowed on
 * a GPU, but is not part of the graph: it is counted.
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct { int size, room, *at; } Nodes;
typedef struct { int open, broken, nodes; unsigned long long id; cudaStream_t origin; char *followed; } Capture;
typedef struct { Capture *capture; Nodes last; } Point; /* a stream or an event: the nodes that come before it */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
enum { LAUNCHES, CAPTURED, BESIDE, WAITS, TO_DEVICE, TO_HOST, GRAPHS, REPLAYS, COUNTERS };
static long count[COUNTERS];
static char refused[1 << 14];
static Point default_stream;
static Capture *underway;
static unsigned long long captures;
static __thread enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
static __thread cudaError_t last_error;

long fake_cuda_count(int which) { return count[which]; }
const char *fake_cuda_refused(void) { return refused; }
void fake_cuda_reset(void) { memset(count, 0, sizeof count); refused[0] = 0; }

static cudaError_t refuse(cudaError_t error, const char *call, const char *why) {
    size_t used = strlen(refused);
    snprintf(refused + used, sizeof refused - used, "%s: %s\n", call, why);
    if (underway) underway->broken = 1;
    return last_error = error;
}
#define UNSAFE \
    if (underway && mode != cudaStreamCaptureModeRelaxed) \
        return refuse(cudaErrorStreamCaptureUnsupported, __func__, "during a capture")

static Point *of(cudaStream_t stream) { return (size_t)stream < 3 ? &default_stream : (Point *)stream; }
static int is_captured(const Point *point) { return point->capture && point->capture->open; }

static void add(Nodes *nodes, int node) {
    for (int i = 0; i < nodes->size; i++)
        if (nodes->at[i] == node) return;
    if (nodes->size == nodes->room) nodes->at = realloc(nodes->at, (nodes->room = 2 * nodes->room + 4) * sizeof(int));
    nodes->at[nodes->size++] = node;
}
static void work(cudaStream_t stream) {
    Point *point = of(stream);
    pthread_mutex_lock(&lock);
    count[LAUNCHES]++;
    if (is_captured(point)) {
        Capture *capture = point->capture;
        count[CAPTURED]++;
        capture->followed = realloc(capture->followed, capture->nodes + 1);
        capture->followed[capture->nodes] = 0;
        for (int i = 0; i < point->last.size; i++) capture->followed[point->last.at[i]] = 1;
        point->last.size = 0;
        add(&point->last, capture->nodes++);
    } else if (underway) {
        count[BESIDE]++;
    }
    pthread_mutex_unlock(&lock);
}

/* ------------------------------------------------------------------------------------------------------- the device */

cudaError_t cudaGetDeviceCount(int *found) { *found = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "fake CUDA");
    p->major = 9, p->multiProcessorCount = 132, p->warpSize = 32, p->totalGlobalMem = 140ul << 30;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536, p->l2CacheSize = 60 << 20;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr name, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (name) {
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrWarpSize: *value = p.warpSize; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
        default: *value = 1;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) { snprintf(id, size, "0"); return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) { UNSAFE; count[WAITS]++; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }

static int succeed(void) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = &default_stream; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
    *function = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)succeed : (void *)cuDevicePrimaryCtxGetState;
    if (found) *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------------------------ memory */

static struct { const char *start, *end; } pinned[1024];
static int pins;
static int is_pinned(const void *p) {
    for (int i = 0; i < pins; i++)
        if ((const char *)p >= pinned[i].start && (const char *)p < pinned[i].end) return 1;
    return 0;
}
cudaError_t cudaMalloc(void **p, size_t size) {
    UNSAFE;
    *p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *p == MAP_FAILED ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void *p) { UNSAFE; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 140ul << 30; return cudaSuccess; }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
    UNSAFE;
    if (pins == 1024) return cudaErrorMemoryAllocation;
    *p = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    pinned[pins].start = *p, pinned[pins++].end = (char *)*p + size;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) { UNSAFE; return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p) {
    memset(found, 0, sizeof *found);
    found->type = is_pinned(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}
static void copy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyHostToDevice) count[TO_DEVICE]++;
    if (kind == cudaMemcpyDeviceToHost) count[TO_HOST]++;
    memmove(to, from, size);
    if (kind == cudaMemcpyDeviceToHost && size <= 64) memset(to, size == 1, size);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    UNSAFE;
    count[WAITS]++;
    copy(to, from, size, kind);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    const void *host = kind == cudaMemcpyHostToDevice ? from : kind == cudaMemcpyDeviceToHost ? to : 0;
    if (host && is_captured(of(stream)) && !is_pinned(host))
        return refuse(cudaErrorStreamCaptureUnsupported, __func__, "between the host and a captured stream");
    work(stream);
    copy(to, from, size, kind);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int value, size_t size) { UNSAFE; memset(p, value, size); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream) {
    work(stream);
    memset(p, value, size);
    return cudaSuccess;
}

/* ----------------------------------------------------------------------------------------------------------- kernels */

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
    work(s);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *f, void **arguments) {
    work(how->stream);
    return cudaSuccess;
}
/* what nvcc of CUDA 13 makes of <<< >>> */
cudaError_t __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
    work(s);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *f) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->ptxVersion = found->binaryVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute name, int value) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *f, int size, size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int size, size_t shared,
                                                                   unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------------ streams and events */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = calloc(1, sizeof(Point));
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
#define NOT_CAPTURED(point, error) if (is_captured(point)) return refuse(error, __func__, "of what is captured")
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    NOT_CAPTURED(of(stream), cudaErrorStreamCaptureUnsupported);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    NOT_CAPTURED(of(stream), cudaErrorStreamCaptureUnsupported);
    count[WAITS]++;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof(Point));
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    Point *found = (Point *)event, *now = of(stream);
    pthread_mutex_lock(&lock);
    found->capture = is_captured(now) ? now->capture : 0;
    found->last.size = 0;
    for (int i = 0; found->capture && i < now->last.size; i++) add(&found->last, now->last.at[i]);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    UNSAFE;
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    UNSAFE;
    count[WAITS]++;
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 1; return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    Point *before = (Point *)event, *now = of(stream);
    if (!is_captured(before) && is_captured(now))
        return refuse(cudaErrorStreamCaptureIsolation, __func__, "for what is not captured");
    pthread_mutex_lock(&lock);
    if (is_captured(before) && !is_captured(now)) now->capture = before->capture, now->last.size = 0;
    for (int i = 0; is_captured(before) && i < before->last.size; i++) add(&now->last, before->last.at[i]);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* ----------------------------------------------------------------------------------------------------------- capture */

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *given) {
    enum cudaStreamCaptureMode before = mode;
    mode = *given, *given = before;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    Point *point = of(stream);
    *status = !is_captured(point)      ? cudaStreamCaptureStatusNone
              : point->capture->broken ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *size) {
    cudaStreamIsCapturing(stream, status);
    if (id && is_captured(of(stream))) *id = of(stream)->capture->id;
    if (graph) *graph = (cudaGraph_t)of(stream)->capture;
    if (nodes) *nodes = 0;
    if (edges) *edges = 0;
    if (size) *size = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode given) {
    if (of(stream) == &default_stream || underway)
        return refuse(cudaErrorStreamCaptureUnsupported, __func__, "on the default stream, or within another");
    underway = of(stream)->capture = calloc(1, sizeof(Capture));
    underway->open = 1, underway->id = ++captures, underway->origin = stream, of(stream)->last.size = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    Capture *capture = of(stream)->capture;
    int loose = 0;
    *graph = 0;
    if (!capture || capture != underway || capture->origin != stream)
        return refuse(cudaErrorStreamCaptureUnmatched, __func__, "on another stream");
    for (int i = 0; i < of(stream)->last.size; i++) capture->followed[of(stream)->last.at[i]] = 1;
    for (int i = 0; i < capture->nodes; i++) loose += !capture->followed[i];
    capture->open = 0, underway = 0;
    if (capture->broken) return last_error = cudaErrorStreamCaptureInvalidated;
    if (loose) return refuse(cudaErrorStreamCaptureUnjoined, __func__, "a branch has not joined");
    *graph = (cudaGraph_t)capture;
    count[GRAPHS]++;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(made, graph, flags);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *size) {
    *size = ((Capture *)graph)->nodes;
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    count[REPLAYS]++;
    work(stream);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { UNSAFE; return cudaSuccess; }

/* ---------------------------------------------------------------------------- matrix products: libraries that launch */

int cublasCreate_v2(void **handle) { *handle = calloc(1, sizeof(cudaStream_t)); return 0; }
int cublasSetStream_v2(cudaStream_t *handle, cudaStream_t stream) { *handle = stream; return 0; }
int cublasGetMathMode(void *handle, int *found) { *found = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *found) { *found = 0; return 0; }
#define DOES_NOTHING(name) int name(void) { return 0; }
DOES_NOTHING(cublasDestroy_v2)
DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasSetPointerMode_v2)
#define PRODUCT(name) int name(cudaStream_t *handle) { work(*handle); return 0; }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
#define MAKES(name) int name(void **made) { *made = calloc(1, 256); return 0; }
MAKES(cublasLtCreate)
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatrixLayoutCreate)
MAKES(cublasLtMatmulPreferenceCreate)
DOES_NOTHING(cublasLtMatmulDescDestroy)
DOES_NOTHING(cublasLtMatrixLayoutDestroy)
DOES_NOTHING(cublasLtMatmulPreferenceDestroy)
DOES_NOTHING(cublasLtMatmulDescSetAttribute)
DOES_NOTHING(cublasLtMatrixLayoutSetAttribute)
DOES_NOTHING(cublasLtMatmulPreferenceSetAttribute)
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    *found = 1;
    return 0;
}
int cublasLtMatmul(void *handle, void *product, void *alpha, void *a, void *la, void *b, void *lb, void *beta, void *c,
                   void *lc, void *d, void *ld, void *algorithm, void *space, size_t size, cudaStream_t stream) {
    work(stream);
    return 0;
}
