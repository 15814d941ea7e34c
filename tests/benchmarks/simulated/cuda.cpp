/* SPDX-License-Identifier: MIT
 * A small libcuda.so.1: runs the benchmarks' own kernels on this machine, keeps a clock of its own, and checks what it
 * is asked.
 *
 * Every wrong use (memory that is not there or too short, a handle that is not alive, no context) is answered with an
 * error and told in the log. Streams are as lazy as they may be: what is queued on one happens when somebody waits for
 * it, and a copy from ordinary memory may still be under way when its call returns, until the context is waited for.
 * So a program that forgets to wait gets wrong results here. From the environment:
 *   SIM_LOG     file: a line for each call, and at the end what was left unfreed
 *   SIM_FAIL    CALL:N:CODE, the Nth call of this name is answered with CODE and not done; N 0: every one
 *   SIM_WRONG   kernel or copy: adds to a byte of its output, each time
 *   SIM_IDLE    kernel that takes its time and does nothing
 *   SIM_FLIP    WORD:BIT, a bit of the tested memory that flips as soon as it is written
 *   SIM_HANG    CALL that does not return
 *   SIM_SLOW_MS so long the card's memory takes to be had, really
 *   SIM_MIB     the card's memory
 *   SIM_SMS     its multiprocessors
 *   SIM_MPS     file: the card is shared by all processes that are given this one, as clients of one MPS server
 *   SIM_SERVER  percent of the threads that this server gives at most
 *   SIM_BROKEN  what this server does wrong: turns (one client at a time), unfair (a full card is the first one's),
 *               threads, loose or memory (ignores a client's share or its limit; loose: says that it does not), fragile
 *               (a client that is refused memory takes the others along) */
#include "device.h"

#include <deque>
#include <errno.h>
#include <fcntl.h>
#include <functional>
#include <map>
#include <set>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/file.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default")))

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201, INVALID_PTX = 218,
       INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, LAUNCH_FAILED = 719 };

/* Of the card: at least two multiprocessors, so that more than one block runs; a small cache. */
static int sms() { const char *n = getenv("SIM_SMS"); return n ? atoi(n) : 2; }
static const int L2 = 65536;
/* Rates that tests know. Arithmetic is slow enough for the fewest rounds. */
static const double DEVICE_GB = 400, PINNED_UP = 20, PINNED_DOWN = 16, PAGEABLE_UP = 5, PAGEABLE_DOWN = 4, FLOPS = 1e9, TICK_US = 3;

static std::map<uint64_t, size_t> memory, pinned;
static std::set<void *> modules;
typedef std::deque<std::function<void()>> queue_t;
static std::map<void *, queue_t> streams;
/* `done` when the stream has come to it; `turn` counts its records. */
struct event_t { double at; bool done; void *stream; int turn; };
static std::set<event_t *> events;
static std::map<std::string, int> calls;
static double clock_ms;
static size_t allocated;
static int initialized, retained, current;
static FILE *record;

static size_t total() { const char *m = getenv("SIM_MIB"); return (size_t)(m ? atoi(m) : 16) << 20; }

static void told(const char *format, const char *call, const char *what)
{
    if (!record && getenv("SIM_LOG")) record = fopen(getenv("SIM_LOG"), "a");
    if (!record) return;
    fprintf(record, format, call, what);
    fflush(record);
}

/* The shared card. A client has work on it from a launch until all its streams are empty, on so many multiprocessors. */
struct client_t { int pid, sms; };
struct server_t { client_t clients[16]; int refused; };
static server_t *server;
static client_t *mine;
/* Beside the client's data a context's own memory counts towards its limit. */
static const size_t CONTEXT = 1 << 20;

static bool broken(const char *how) { const char *what = getenv("SIM_BROKEN"); return what && !strcmp(what, how); }
static void connect_to_server()
{
    const char *path = getenv("SIM_MPS");
    if (!path || server) return;
    int file = open(path, O_RDWR | O_CREAT, 0666);
    if (file < 0 || ftruncate(file, sizeof *server)) abort();
    server = (server_t *)mmap(NULL, sizeof *server, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    flock(file, LOCK_EX);
    for (client_t &each : server->clients)
        if (!mine && (!each.pid || (kill(each.pid, 0) && errno == ESRCH))) mine = &each, each = {getpid(), 0};
    flock(file, LOCK_UN);
    close(file);
    if (!mine) abort();
}
static void at_work(int count) { if (mine) __atomic_store_n(&mine->sms, count, __ATOMIC_SEQ_CST); }

/* "Internally rounded down", says the manual of MPS; a client can only lower what the server gives. */
static int given_by_percent()
{
    double percent = atof(getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")), most = getenv("SIM_SERVER") ? atof(getenv("SIM_SERVER")) : 100;
    int count = (int)((double)sms() * (percent < most ? percent : most) / 100);
    return count ? count : 1;
}
static int visible() { return server && !broken("threads") ? given_by_percent() : sms(); }

/* How many multiprocessors' work this client gets done that has enough for `wanted`. */
static double served(int wanted)
{
    if (!server) return wanted;
    int all = 0, clients = 0;
    bool first = false;
    for (client_t &each : server->clients) {
        int count = __atomic_load_n(&each.sms, __ATOMIC_SEQ_CST);
        if (!count || (kill(each.pid, 0) && errno == ESRCH)) continue;
        if (!clients) first = &each == mine;
        all += count;
        clients++;
    }
    if (broken("turns")) return (double)wanted / clients;
    if (broken("unfair") && clients > 1 && all >= sms()) return first ? wanted : wanted * 0.05;
    return all > sms() ? (double)wanted * sms() / all : wanted;
}

static bool taken_along() { return server && server->refused && server->refused != getpid() && broken("fragile"); }

static size_t memory_limit()
{
    const char *text = getenv("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT");
    unsigned long amount;
    char unit;
    if (!server || !text || broken("memory")) return (size_t)-1;
    if (sscanf(text, "0=%lu%c", &amount, &unit) != 2 || (unit != 'M' && unit != 'G')) abort();
    return (size_t)amount << (unit == 'M' ? 20 : 30);
}

/* The answer that a test asked for, 0: none. Every call comes here first. */
static int enter(const char *call)
{
    int count = ++calls[call];
    told("%s%s\n", call, "");
    const char *hang = getenv("SIM_HANG");
    while (hang && !strcmp(hang, call)) pause();
    const char *fail = getenv("SIM_FAIL");
    char name[64];
    int nth, code;
    if (fail && sscanf(fail, "%63[^:]:%d:%d", name, &nth, &code) == 3 && !strcmp(name, call) && (!nth || nth == count)) return code;
    return OK;
}

static int bad(const char *call, const char *why, int code)
{
    told("WRONG USE %s: %s\n", call, why);
    return code;
}

#define ENTER if (int asked = enter(__func__)) return asked
#define CURRENT ENTER; if (!current) return bad(__func__, "no context", INVALID_CONTEXT); if (taken_along()) return LAUNCH_FAILED

static bool within(const std::map<uint64_t, size_t> &all, uint64_t address, size_t size)
{
    auto next = all.upper_bound(address);
    if (next == all.begin()) return false;
    --next;
    return address - next->first <= next->second && size <= next->second - (address - next->first);
}

/* Of the default stream: what has not arrived yet. */
static queue_t arriving;
static void rest_if_idle() { for (auto &stream : streams) if (!stream.second.empty()) return; at_work(0); }
static void run(queue_t &queue) { while (!queue.empty()) { auto work = queue.front(); queue.pop_front(); work(); } rest_if_idle(); }
static void run_all() { run(arriving); for (auto &stream : streams) run(stream.second); }
static void reach(event_t *event)
{
    for (int turn = event->turn; !event->done && event->turn == turn;) {
        queue_t &queue = streams[event->stream];
        if (queue.empty()) break;
        auto work = queue.front();
        queue.pop_front();
        work();
    }
    rest_if_idle();
}

static void at_end() __attribute__((destructor));
static void at_end()
{
    if (mine) *mine = {0, 0};
    std::string left;
    auto count = [&](const char *what, size_t n) { if (n) left += " " + std::to_string(n) + " " + what; };
    count("memory", memory.size());
    count("pinned", pinned.size());
    count("streams", streams.size());
    count("events", events.size());
    count("modules", modules.size());
    count("contexts", (size_t)retained);
    told("LEFT:%s%s\n", left.c_str(), "");
}

API int cuInit(unsigned flags)
{
    ENTER;
    if (flags) return bad(__func__, "flags", INVALID_VALUE);
    connect_to_server();
    initialized = 1;
    return OK;
}

API int cuGetErrorName(int code, const char **name)
{
    ENTER;
    static const std::map<int, const char *> names = {
        {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {46, "CUDA_ERROR_DEVICE_UNAVAILABLE"},
        {100, "CUDA_ERROR_NO_DEVICE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"}, {218, "CUDA_ERROR_INVALID_PTX"},
        {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"}, {400, "CUDA_ERROR_INVALID_HANDLE"}, {600, "CUDA_ERROR_NOT_READY"},
        {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {719, "CUDA_ERROR_LAUNCH_FAILED"}, {801, "CUDA_ERROR_NOT_SUPPORTED"}};
    auto found = names.find(code);
    if (found == names.end()) return INVALID_VALUE;
    *name = found->second;
    return OK;
}
API int cuGetErrorString(int code, const char **text)
{
    ENTER;
    static char said[64];
    snprintf(said, sizeof said, "text of error %d", code);
    *text = said;
    return OK;
}

API int cuDeviceGetByPCIBusId(int *device, const char *bus_id)
{
    ENTER;
    if (!initialized) return bad(__func__, "not initialized", NOT_INITIALIZED);
    if (strcmp(bus_id, "0000:01:00.0")) return bad(__func__, bus_id, INVALID_VALUE);
    *device = 0;
    return OK;
}
API int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    ENTER;
    if (!initialized || device) return bad(__func__, "device", INVALID_VALUE);
    switch (attribute) {
    case 16: *value = visible(); return OK;
    case 37: *value = 256; return OK;
    case 38: *value = L2; return OK;
    case 40: *value = 2; return OK;
    case 133: *value = server != NULL; return OK;
    default: return bad(__func__, "an attribute that nobody needs", INVALID_VALUE);
    }
}
API int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags)
{
    ENTER;
    return device || flags != 4 ? bad(__func__, "flags", INVALID_VALUE) : OK;
}
API int cuDevicePrimaryCtxRetain(void **context, int device)
{
    ENTER;
    const char *share = getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE");
    if (device) return bad(__func__, "device", INVALID_VALUE);
    if (!share || (server ? atof(share) <= 0 || atof(share) > 100 : strcmp(share, "100") != 0))
        return bad(__func__, "not all threads under MPS", INVALID_VALUE);
    retained++;
    setenv("SIM_CONTEXT", "1", 1);
    *context = &retained;
    return OK;
}
API int cuDevicePrimaryCtxRelease_v2(int device)
{
    ENTER;
    if (device || !retained) return bad(__func__, "not retained", INVALID_CONTEXT);
    if (!--retained) current = 0;
    return OK;
}
API int cuCtxSetCurrent(void *context) { ENTER; if (context != &retained) return bad(__func__, "context", INVALID_CONTEXT); current = 1; return OK; }

API int cuCtxSynchronize() { CURRENT; run_all(); return OK; }

API int cuModuleLoadDataEx(void **module, const char *text, unsigned count, const int *options, void **values)
{
    CURRENT;
    if (count != 2 || options[0] != 5 || options[1] != 6 || !values[0] || (size_t)values[1] < 1024)
        return bad(__func__, "options", INVALID_VALUE);
    if (!strstr(text, "\n.version 8.2\n.target sm_80\n")) {
        snprintf((char *)values[0], (size_t)values[1], "ptxas application ptx input, line 1; fatal   : no PTX");
        return INVALID_PTX;
    }
    modules.insert(*module = strdup(text));
    return OK;
}
API int cuModuleUnload(void *module)
{
    CURRENT;
    if (!modules.erase(module)) return bad(__func__, "not loaded", INVALID_HANDLE);
    free(module);
    return OK;
}

extern "C" {
void memory_copy(uint4 *, const uint4 *, unsigned long long);
void memory_triad(float4 *, const float4 *, const float4 *, float, unsigned long long);
void pattern_write(uint4 *, unsigned long long, unsigned long long, unsigned, unsigned);
void pattern_check(const uint4 *, unsigned long long, unsigned long long, unsigned, unsigned, void *);
void fp32_fma(float *, const float *, unsigned);
void tensor_fp16(float *, const unsigned *, unsigned);
void tensor_bf16(float *, const unsigned *, unsigned);
void tensor_tf32(float *, const unsigned *, unsigned);
void tensor_int8(int *, const unsigned *, unsigned);
void launch_tick(unsigned *);
}
static const char *const KERNELS[] = {"memory_copy", "memory_triad", "pattern_write", "pattern_check", "fp32_fma", "tensor_fp16",
                                      "tensor_bf16", "tensor_tf32", "tensor_int8", "launch_tick", "launch_spin"};

API int cuModuleGetFunction(void **function, void *module, const char *name)
{
    CURRENT;
    if (!modules.count(module)) return bad(__func__, "module", INVALID_HANDLE);
    std::string entry = std::string(".entry ") + name + "(";
    if (!strstr((const char *)module, entry.c_str())) return bad(__func__, name, NOT_FOUND);
    for (const char *const &kernel : KERNELS)
        if (!strcmp(kernel, name)) return *function = (void *)&kernel, OK;
    return NOT_FOUND;
}
static const char *kernel_of(void *function)
{
    for (const char *const &kernel : KERNELS)
        if (function == (void *)&kernel) return kernel;
    return NULL;
}
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared)
{
    CURRENT;
    if (!kernel_of(function) || threads != 256 || shared) return bad(__func__, "function", INVALID_VALUE);
    *blocks = 1;
    return OK;
}

API int cuMemGetInfo_v2(size_t *free_bytes, size_t *all)
{
    CURRENT;
    *all = total();
    *free_bytes = (memory_limit() < total() ? memory_limit() - CONTEXT : total()) - allocated;
    return OK;
}
API int cuMemAlloc_v2(uint64_t *address, size_t size)
{
    CURRENT;
    if (!size) return bad(__func__, "nothing", INVALID_VALUE);
    if (allocated + size > total()) return OUT_OF_MEMORY;
    if (memory_limit() < allocated + size + CONTEXT) {
        server->refused = getpid();
        return OUT_OF_MEMORY;
    }
    if (getenv("SIM_SLOW_MS")) usleep(1000 * (unsigned)atoi(getenv("SIM_SLOW_MS")));
    void *made = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(made, 0x5a, size);
    memory[*address = (uint64_t)made] = size;
    allocated += size;
    return OK;
}
API int cuMemFree_v2(uint64_t address)
{
    CURRENT;
    auto found = memory.find(address);
    if (found == memory.end()) return bad(__func__, "not allocated", INVALID_VALUE);
    run_all();
    allocated -= found->second;
    free((void *)address);
    memory.erase(found);
    return OK;
}
API int cuMemHostAlloc(void **address, size_t size, unsigned flags)
{
    CURRENT;
    if (!size || flags) return bad(__func__, "flags", INVALID_VALUE);
    *address = calloc(1, size);
    pinned[(uint64_t)*address] = size;
    return OK;
}
API int cuMemFreeHost(void *address)
{
    CURRENT;
    if (!pinned.count((uint64_t)address)) return bad(__func__, "not allocated", INVALID_VALUE);
    run_all();
    pinned.erase((uint64_t)address);
    free(address);
    return OK;
}

static void takes_gb(size_t bytes, double rate) { clock_ms += (double)bytes / rate / 1e6; }
static void spoiled(const char *call, uint64_t address, size_t size)
{
    const char *wrong = getenv("SIM_WRONG");
    if (wrong && !strcmp(wrong, call)) *((char *)address + size / 2) += 16;
}
static void arrive(const char *call, uint64_t to, uint64_t from, size_t size, double rate)
{
    memcpy((void *)to, (void *)from, size);
    takes_gb(size, rate);
    spoiled(call, to, size);
}
#define STREAM if (!streams.count(stream)) return bad(__func__, "stream", INVALID_HANDLE)
API int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size)
{
    CURRENT;
    if (!within(memory, to, size)) return bad(__func__, "device memory", INVALID_VALUE);
    run(arriving);
    std::string staged((const char *)from, size);
    arriving.push_back([=] { arrive("cuMemcpyHtoD_v2", to, (uint64_t)staged.data(), size, PAGEABLE_UP); });
    return OK;
}
API int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size)
{
    CURRENT;
    if (!within(memory, from, size)) return bad(__func__, "device memory", INVALID_VALUE);
    run(arriving);
    arrive(__func__, (uint64_t)to, from, size, PAGEABLE_DOWN);
    return OK;
}
API int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream)
{
    CURRENT;
    STREAM;
    if (!within(memory, to, size)) return bad(__func__, "device memory", INVALID_VALUE);
    double rate = within(pinned, (uint64_t)from, size) ? PINNED_UP : PAGEABLE_UP;
    streams[stream].push_back([=] { arrive("cuMemcpyHtoDAsync_v2", to, (uint64_t)from, size, rate); });
    return OK;
}
API int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream)
{
    CURRENT;
    STREAM;
    if (!within(memory, from, size)) return bad(__func__, "device memory", INVALID_VALUE);
    double rate = within(pinned, (uint64_t)to, size) ? PINNED_DOWN : PAGEABLE_DOWN;
    streams[stream].push_back([=] { arrive("cuMemcpyDtoHAsync_v2", (uint64_t)to, from, size, rate); });
    return OK;
}
API int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void *stream)
{
    CURRENT;
    STREAM;
    if (!within(memory, to, size)) return bad(__func__, "device memory", INVALID_VALUE);
    streams[stream].push_back([=] { memset((void *)to, value, size); takes_gb(size, DEVICE_GB); });
    return OK;
}

API int cuStreamCreate(void **stream, unsigned flags)
{
    CURRENT;
    if (flags != 1) return bad(__func__, "flags", INVALID_VALUE);
    streams[*stream = malloc(1)] = queue_t();
    return OK;
}
API int cuStreamDestroy_v2(void *stream) { CURRENT; STREAM; run(streams[stream]); streams.erase(stream); free(stream); return OK; }
API int cuStreamSynchronize(void *stream) { CURRENT; STREAM; run(streams[stream]); return OK; }

#define EVENT(event) if (!events.count(event)) return bad(__func__, "event", INVALID_HANDLE)
API int cuStreamWaitEvent(void *stream, event_t *event, unsigned flags)
{
    CURRENT;
    STREAM;
    EVENT(event);
    if (flags) return bad(__func__, "flags", INVALID_VALUE);
    streams[stream].push_back([=] { reach(event); });
    return OK;
}
API int cuEventCreate(event_t **event, unsigned flags)
{
    CURRENT;
    if (flags != 1) return bad(__func__, "flags", INVALID_VALUE);
    events.insert(*event = new event_t{-1, false, NULL, 0});
    return OK;
}
API int cuEventDestroy_v2(event_t *event) { CURRENT; EVENT(event); if (event->stream) reach(event); events.erase(event); delete event; return OK; }
API int cuEventRecord(event_t *event, void *stream)
{
    CURRENT;
    STREAM;
    EVENT(event);
    *event = {-1, false, stream, event->turn + 1};
    streams[stream].push_back([=] { event->at = clock_ms, event->done = true; });
    return OK;
}
API int cuEventSynchronize(event_t *event)
{
    CURRENT;
    EVENT(event);
    if (!event->stream) return bad(__func__, "not recorded", INVALID_HANDLE);
    reach(event);
    return OK;
}
API int cuEventQuery(event_t *event) { CURRENT; EVENT(event); return event->done ? OK : NOT_READY; }
API int cuEventElapsedTime(float *ms, event_t *begin, event_t *end)
{
    CURRENT;
    EVENT(begin);
    EVENT(end);
    if (!end->done || !begin->done) return bad(__func__, "not waited for", NOT_READY);
    *ms = (float)(end->at - begin->at);
    return OK;
}

/* Kernels. */

index3 threadIdx, blockIdx;
unsigned long long now_ns(void) { return (unsigned long long)(clock_ms * 1e6); }

static bool idle;
template <typename Body> static void plain(unsigned blocks, unsigned threads, Body body)
{
    if (idle) return;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) body();
}

static const size_t STACK = 65536;
static struct lane_t {
    ucontext_t context;
    char stack[STACK];
    bool done;
    void *c;
    const unsigned *a, *b;
} lanes[32];
static ucontext_t scheduler;
static unsigned lane_now;
static mma_kind kind_now;
static void (*body_now)(void *);
static void *given_now;

void mma_wait(mma_kind kind, void *c, const unsigned *a, const unsigned *b)
{
    lane_t &lane = lanes[lane_now];
    lane.c = c, lane.a = a, lane.b = b;
    kind_now = kind;
    swapcontext(&lane.context, &scheduler);
}

static float half_of(unsigned bits)
{
    int sign = bits >> 15 & 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent ? ldexpf((float)(1024 + fraction), exponent - 25) : ldexpf((float)fraction, -24);
    return sign ? -size : size;
}
static float single_of(unsigned bits) { float f; memcpy(&f, &bits, 4); return f; }

/* Sums in double hold every product of these numbers exactly; a float that is assigned would round what does not fit. */
static void multiply()
{
    static double a[16][32], b[32][8];
    int depth = kind_now == MMA_TF32 ? 8 : kind_now == MMA_S8 ? 32 : 16;
    for (int lane = 0; lane < 32; lane++) {
        int group = lane >> 2, within = lane % 4;
        const unsigned *ra = lanes[lane].a, *rb = lanes[lane].b;
        switch (kind_now) {
        case MMA_F16: case MMA_BF16:
            for (int i = 0; i < 8; i++) {
                unsigned bits = ra[i / 2] >> i % 2 * 16 & 0xffff;
                int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
                int column = within * 2 + (i & 1) + (i < 4 ? 0 : 8);
                a[row][column] = kind_now == MMA_F16 ? half_of(bits) : single_of(bits << 16);
            }
            for (int i = 0; i < 4; i++) {
                unsigned bits = rb[i / 2] >> i % 2 * 16 & 0xffff;
                b[within * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = kind_now == MMA_F16 ? half_of(bits) : single_of(bits << 16);
            }
            break;
        case MMA_TF32:
            for (int i = 0; i < 4; i++) a[i == 0 || i == 2 ? group : group + 8][i < 2 ? within : within + 4] = single_of(ra[i] & ~0x1fffu);
            for (int i = 0; i < 2; i++) b[i == 0 ? within : within + 4][group] = single_of(rb[i] & ~0x1fffu);
            break;
        case MMA_S8:
            for (int i = 0; i < 16; i++) {
                int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
                a[row][within * 4 + (i & 3) + (i < 8 ? 0 : 16)] = (int8_t)(ra[i / 4] >> i % 4 * 8);
            }
            for (int i = 0; i < 8; i++) b[within * 4 + (i & 3) + (i < 4 ? 0 : 16)][group] = (int8_t)(rb[i / 4] >> i % 4 * 8);
        }
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
            double sum = kind_now == MMA_S8 ? (double)((int *)lanes[lane].c)[i] : (double)((float *)lanes[lane].c)[i];
            for (int k = 0; k < depth; k++) sum += a[row][k] * b[k][column];
            if (kind_now == MMA_S8) ((int *)lanes[lane].c)[i] = (int)(int64_t)sum;
            else ((float *)lanes[lane].c)[i] = (float)sum;
        }
}

static void fiber()
{
    body_now(given_now);
    lanes[lane_now].done = true;
    swapcontext(&lanes[lane_now].context, &scheduler);
}

static void warps(unsigned blocks, unsigned threads, void (*body)(void *), void *given)
{
    if (idle) return;
    body_now = body, given_now = given;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (unsigned warp = 0; warp < threads / 32; warp++) {
            for (lane_t &lane : lanes) {
                getcontext(&lane.context);
                lane.context.uc_stack.ss_sp = lane.stack;
                lane.context.uc_stack.ss_size = STACK;
                lane.done = false;
                makecontext(&lane.context, fiber, 0);
            }
            for (bool all = false; !all;) {
                for (lane_now = 0; lane_now < 32; lane_now++) {
                    threadIdx.x = warp * 32 + lane_now;
                    swapcontext(&scheduler, &lanes[lane_now].context);
                }
                all = lanes[0].done;
                for (lane_t &lane : lanes)
                    if (lane.done != all) abort(); /* a warp that does not go the same way */
                if (!all) multiply();
            }
        }
}

struct tensor_t { void *out; const unsigned *table; unsigned rounds; };

/* What a kernel is given, by value, as a launch keeps it. */
struct given_t {
    uint64_t address[3];
    unsigned long long count, base;
    unsigned word, flip;
    float factor;
};

API int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, void *stream, void **given, void **extra)
{
    CURRENT;
    STREAM;
    const char *name = kernel_of(function);
    if (!name || !gx || gy != 1 || gz != 1 || !bx || by != 1 || bz != 1 || shared || !given || extra)
        return bad(__func__, "shape", INVALID_VALUE);
    told("  %s%s\n", name, "");
    std::string kernel = name;
    given_t g = {};
    double ms = 0;
    size_t size = 4;
    std::function<void()> body;
#define ADDRESS(n) (*(uint64_t *)given[n])
#define LONG(n) (*(unsigned long long *)given[n])
#define WORD(n) (*(unsigned *)given[n])
#define NEEDS(n, bytes) if (!within(memory, ADDRESS(n), bytes)) return bad(name, "argument " #n, INVALID_VALUE)
#define COVERS(vectors) if (bx != 256 || gx != ((vectors) + 1023) / 1024) return bad(name, "grid", INVALID_VALUE)
#define MS_OF(bytes) ((double)(bytes) / DEVICE_GB / 1e6)
    if (kernel == "launch_spin") {
        double spun = (double)LONG(0) / 1e6;
        streams[stream].push_back([=] { clock_ms += spun; });
        return OK;
    }
    g.address[0] = ADDRESS(0);
    if (kernel == "memory_copy") {
        g.count = LONG(2), size = g.count * 16;
        COVERS(g.count); NEEDS(0, size); NEEDS(1, size);
        g.address[1] = ADDRESS(1);
        body = [=] { plain(gx, bx, [&] { memory_copy((uint4 *)g.address[0], (uint4 *)g.address[1], g.count); }); };
        ms = MS_OF(2 * size);
    } else if (kernel == "memory_triad") {
        g.count = LONG(4), size = g.count * 16;
        COVERS(g.count); NEEDS(0, size); NEEDS(1, size); NEEDS(2, size);
        g.address[1] = ADDRESS(1), g.address[2] = ADDRESS(2), g.factor = *(float *)given[3];
        body = [=] { plain(gx, bx, [&] {
            memory_triad((float4 *)g.address[0], (float4 *)g.address[1], (float4 *)g.address[2], g.factor, g.count);
        }); };
        ms = MS_OF(3 * size);
    } else if (kernel == "pattern_write" || kernel == "pattern_check") {
        bool check = kernel == "pattern_check";
        g.count = LONG(1), g.base = LONG(2), g.word = WORD(3), g.flip = WORD(4), size = g.count * 16;
        COVERS(g.count); NEEDS(0, size);
        ms = MS_OF(size);
        if (check) {
            NEEDS(5, 16 + 64 * 16);
            g.address[1] = ADDRESS(5);
            size = 0;
        }
        body = [=] {
            plain(gx, bx, [&] {
                if (check) pattern_check((uint4 *)g.address[0], g.count, g.base, g.word, g.flip, (void *)g.address[1]);
                else pattern_write((uint4 *)g.address[0], g.count, g.base, g.word, g.flip);
            });
            unsigned long long word;
            unsigned bit;
            const char *flip = check ? NULL : getenv("SIM_FLIP");
            if (flip && sscanf(flip, "%llu:%u", &word, &bit) == 2 && word >= g.base && word - g.base < g.count * 4)
                ((unsigned *)g.address[0])[word - g.base] ^= 1u << bit;
        };
    } else if (kernel == "fp32_fma") {
        size = (size_t)gx * 8 * 256 * 4;
        NEEDS(0, size); NEEDS(1, 12 * 256 * 4);
        if (bx != 256) return bad(name, "block", INVALID_VALUE);
        g.address[1] = ADDRESS(1), g.word = WORD(2);
        body = [=] { plain(gx, bx, [&] { fp32_fma((float *)g.address[0], (float *)g.address[1], g.word); }); };
        ms = 2.0 * 8 * (32.0 * g.word + 2) * 256 * gx / FLOPS * 1e3 * sms();
    } else if (kernel.rfind("tensor_", 0) == 0) {
        size = (size_t)gx * 8 * 32 * 32 * 4;
        NEEDS(0, size); NEEDS(1, 8 * 32 * (16 + 16 + 32) * 4);
        if (bx != 256) return bad(name, "block", INVALID_VALUE);
        tensor_t what = {(void *)ADDRESS(0), (unsigned *)ADDRESS(1), WORD(2)};
        double depth = kernel == "tensor_tf32" ? 8 : kernel == "tensor_int8" ? 32 : 16;
#define BODY(kind, type) [](void *g) { tensor_t *t = (tensor_t *)g; tensor_##kind((type *)t->out, t->table, t->rounds); }
        void (*lane)(void *) = kernel == "tensor_fp16" ? (void (*)(void *))BODY(fp16, float)
                             : kernel == "tensor_bf16" ? BODY(bf16, float)
                             : kernel == "tensor_tf32" ? BODY(tf32, float) : BODY(int8, int);
        body = [=] { tensor_t own = what; warps(gx, bx, lane, &own); };
        ms = 2.0 * 16 * 8 * depth * 32 * what.rounds * 8 * gx / FLOPS * 1e3;
    } else {
        NEEDS(0, 4);
        body = [=] { plain(gx, bx, [&] { launch_tick((unsigned *)g.address[0]); }); };
        ms = TICK_US / 1e3;
    }
    int wanted = broken("loose") && (int)gx >= visible() ? sms() : (int)gx < visible() ? (int)gx : visible();
    bool arithmetic = kernel == "fp32_fma";
    at_work(wanted);
    streams[stream].push_back([=] {
        idle = getenv("SIM_IDLE") && kernel == getenv("SIM_IDLE");
        body();
        clock_ms += arithmetic ? ms / served(wanted) : ms;
        if (size) spoiled(name, g.address[0], size);
    });
    return OK;
}
