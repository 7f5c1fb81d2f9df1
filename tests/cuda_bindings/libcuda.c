/* A driver without devices that pretends to have two, for the real bindings to call.

   Copies are done at once, between addresses of the host. What no real driver would
   take, or would take and crash on, is a fault: a call without a current context,
   handles that are not alive, or another device's, memory that is another device's
   (`pretend_owned` says whose it is), a batch that names memory which is not
   registered. Who calls may have functions fail (`pretend_failing`), and reads what
   happened from `pretended`. */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int result;
typedef uint64_t address;

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
enum { MAX_HANDLES = 1 << 16, MAX_PINNED = 1 << 10, FIRST_HANDLE = 0x1000 };
enum { MAX_OWNED = 1 << 16, MAX_DEPTH = 16, NUM_DEVICES = 2, NOBODY = -1 };
enum { LEGACY_STREAM = 1, LEAST_PRIORITY = 0, CONTEXT = 0xc0de };

/* What happened; read by name. */
static struct {
    int faults, current, contexts, streams, events, pinned, batches, batched, copies, records;
    int follows, stream_flags, stream_priority, event_flags, pin_flags, order;
    int ever_0, ever_1; /* contexts of each device that there have been */
    char fault[200];
} told;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char handles[MAX_HANDLES]; /* 's': a stream, 'e': an event */
static char owners[MAX_HANDLES];  /* and the device that has it */
static int num_handles;
static struct { char *start; size_t nbytes; } pins[MAX_PINNED];
static struct { address start; size_t nbytes; int device; } owned[MAX_OWNED];
static int num_owned, contexts_of[NUM_DEVICES];
static char failing[200] = " "; /* names, with a space around each */
static int failing_with;
static __thread int depth, mode, current[MAX_DEPTH];

static result fault(const char *where, const char *what, result error) {
    pthread_mutex_lock(&lock);
    told.faults++;
    snprintf(told.fault, sizeof told.fault, "%s: %s", where, what);
    pthread_mutex_unlock(&lock);
    return error;
}

static int is_failing(const char *function) {
    char name[100];
    snprintf(name, sizeof name, " %s ", function);
    return strstr(failing, name) != NULL;
}

#define FAIL_IF_ASKED() \
    if (is_failing(__func__)) return failing_with
#define NEED_CONTEXT() \
    FAIL_IF_ASKED(); \
    if (depth == 0) return fault(__func__, "no current context", INVALID_CONTEXT)
#define NEED(condition) \
    if (!(condition)) return fault(__func__, #condition, INVALID_VALUE)

static int here(void) { return current[depth - 1]; }

static int is_alive(uintptr_t handle, char kind) {
    return handle >= FIRST_HANDLE && handle < FIRST_HANDLE + MAX_HANDLES &&
           handles[handle - FIRST_HANDLE] == kind;
}

/* Whether it is alive, and of the current device. */
static int is_here(uintptr_t handle, char kind) {
    return is_alive(handle, kind) && owners[handle - FIRST_HANDLE] == here();
}

static int is_stream(uintptr_t handle) {
    return handle == LEGACY_STREAM || is_here(handle, 's');
}

/* The device that has all of the memory; NOBODY where that is the host's, or in part. */
static int owner_of(address start, size_t nbytes) {
    int owner = NOBODY;
    pthread_mutex_lock(&lock);
    /* The newest first: memory that was freed may have been given again. */
    for (int number = num_owned - 1; number >= 0; number--)
        if (start >= owned[number].start &&
            start + nbytes <= owned[number].start + owned[number].nbytes) {
            owner = owned[number].device;
            break;
        }
    pthread_mutex_unlock(&lock);
    return owner;
}

static uintptr_t new_handle(char kind) {
    pthread_mutex_lock(&lock);
    int number = num_handles++ % MAX_HANDLES;
    handles[number] = kind;
    owners[number] = here();
    pthread_mutex_unlock(&lock);
    return FIRST_HANDLE + number;
}

static void add(int *number, int more) { __atomic_add_fetch(number, more, __ATOMIC_SEQ_CST); }

/* ------------------------------------------------------------- for the tests */

int pretended(const char *name) {
#define TELL(field) if (strcmp(name, #field) == 0) return told.field
    TELL(faults); TELL(current); TELL(contexts); TELL(streams); TELL(events); TELL(pinned);
    TELL(batches); TELL(batched); TELL(copies); TELL(records); TELL(follows);
    TELL(stream_flags); TELL(stream_priority); TELL(event_flags); TELL(pin_flags);
    TELL(order); TELL(ever_0); TELL(ever_1);
    return -1;
}

const char *pretended_fault(void) { return told.fault; }

/* `functions`: names, with a space around each. */
void pretend_failing(const char *functions, int with) {
    snprintf(failing, sizeof failing, "%s", functions);
    failing_with = with;
}

/* From here on the memory is a device's, or nobody's again. */
void pretend_owned(address start, size_t nbytes, int device) {
    pthread_mutex_lock(&lock);
    if (num_owned < MAX_OWNED) {
        owned[num_owned].start = start;
        owned[num_owned].nbytes = nbytes;
        owned[num_owned++].device = device;
    }
    pthread_mutex_unlock(&lock);
}

/* ---------------------------------------------------------------- the driver */

result cuInit(unsigned flags) { FAIL_IF_ASKED(); NEED(flags == 0); return SUCCESS; }

result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }

result cuGetErrorString(result error, const char **text) {
    *text = error == 2 ? "out of memory" : "something else";
    return SUCCESS;
}

static int is_device(int number) { return number >= 0 && number < NUM_DEVICES; }

result cuDeviceGet(int *device, int number) {
    NEED(is_device(number));
    *device = number;
    return SUCCESS;
}

result cuDeviceGetAttribute(int *value, int attribute, int device) {
    NEED(is_device(device));
    /* CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, and nothing else is asked for. */
    NEED(attribute == 91);
    *value = 1;
    return SUCCESS;
}

result cuDeviceGetPCIBusId(char *text, int length, int device) {
    NEED(is_device(device));
    snprintf(text, length, "0000:%02d:00.0", device + 1);
    return SUCCESS;
}

result cuDevicePrimaryCtxRetain(uintptr_t *context, int device) {
    NEED(is_device(device));
    add(&told.contexts, 1);
    add(device ? &told.ever_1 : &told.ever_0, 1);
    add(&contexts_of[device], 1);
    *context = CONTEXT + device;
    return SUCCESS;
}

result cuDevicePrimaryCtxRelease_v2(int device) {
    NEED(is_device(device) && contexts_of[device] > 0);
    add(&contexts_of[device], -1);
    add(&told.contexts, -1);
    return SUCCESS;
}

result cuCtxPushCurrent_v2(uintptr_t context) {
    int device = (int)(context - CONTEXT);
    NEED(is_device(device) && contexts_of[device] > 0 && depth < MAX_DEPTH);
    current[depth++] = device;
    add(&told.current, 1);
    return SUCCESS;
}

result cuCtxPopCurrent_v2(uintptr_t *context) {
    NEED(depth > 0 && mode == 0);
    *context = CONTEXT + current[--depth];
    add(&told.current, -1);
    return SUCCESS;
}

result cuThreadExchangeStreamCaptureMode(int *other) {
    int before = mode;
    NEED(*other >= 0 && *other <= 2);
    mode = *other;
    *other = before;
    return SUCCESS;
}

result cuCtxSynchronize(void) { NEED_CONTEXT(); return SUCCESS; }

result cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    NEED_CONTEXT();
    *least = LEAST_PRIORITY;
    *greatest = -5;
    return SUCCESS;
}

result cuStreamCreateWithPriority(uintptr_t *stream, unsigned flags, int priority) {
    NEED_CONTEXT();
    told.stream_flags = flags;
    told.stream_priority = priority;
    add(&told.streams, 1);
    *stream = new_handle('s');
    return SUCCESS;
}

result cuStreamDestroy_v2(uintptr_t stream) {
    NEED_CONTEXT();
    NEED(is_here(stream, 's'));
    handles[stream - FIRST_HANDLE] = 0;
    add(&told.streams, -1);
    return SUCCESS;
}

result cuStreamSynchronize(uintptr_t stream) {
    NEED_CONTEXT();
    NEED(is_stream(stream));
    return SUCCESS;
}

result cuStreamWaitEvent(uintptr_t stream, uintptr_t event, unsigned flags) {
    NEED_CONTEXT();
    NEED(is_stream(stream) && is_alive(event, 'e') && flags == 0);
    add(&told.follows, 1);
    return SUCCESS;
}

result cuEventCreate(uintptr_t *event, unsigned flags) {
    NEED_CONTEXT();
    told.event_flags = flags;
    add(&told.events, 1);
    *event = new_handle('e');
    return SUCCESS;
}

result cuEventDestroy_v2(uintptr_t event) {
    NEED_CONTEXT();
    NEED(is_here(event, 'e'));
    handles[event - FIRST_HANDLE] = 0;
    add(&told.events, -1);
    return SUCCESS;
}

result cuEventRecord(uintptr_t event, uintptr_t stream) {
    NEED_CONTEXT();
    NEED(is_stream(stream) && is_here(event, 'e'));
    add(&told.records, 1);
    return SUCCESS;
}

result cuEventSynchronize(uintptr_t event) {
    NEED_CONTEXT();
    NEED(is_alive(event, 'e'));
    return SUCCESS;
}

result cuMemHostRegister_v2(void *start, size_t nbytes, unsigned flags) {
    NEED_CONTEXT();
    NEED(nbytes > 0 && (uintptr_t)start % 4096 == 0 && nbytes % 4096 == 0);
    told.pin_flags = flags;
    pthread_mutex_lock(&lock);
    int number = 0;
    while (number < MAX_PINNED && pins[number].nbytes) number++;
    if (number < MAX_PINNED) {
        pins[number].start = start;
        pins[number].nbytes = nbytes;
    }
    pthread_mutex_unlock(&lock);
    NEED(number < MAX_PINNED);
    add(&told.pinned, 1);
    return SUCCESS;
}

result cuMemHostUnregister(void *start) {
    NEED_CONTEXT();
    int is_found = 0;
    pthread_mutex_lock(&lock);
    for (int number = 0; number < MAX_PINNED; number++)
        if (pins[number].nbytes && pins[number].start == start)
            is_found = 1, pins[number].nbytes = 0;
    pthread_mutex_unlock(&lock);
    NEED(is_found);
    add(&told.pinned, -1);
    return SUCCESS;
}

/* Whether memory lies in a registered range (1), or not (0), or in part or in two (-1). */
static int pinned_as(address start, size_t nbytes) {
    int is_touched = 0;
    for (int number = 0; number < MAX_PINNED; number++) {
        address first = (address)pins[number].start, end = first + pins[number].nbytes;
        if (pins[number].nbytes == 0) continue;
        if (start >= first && start + nbytes <= end) return 1;
        is_touched |= start < end && first < start + nbytes;
    }
    return is_touched ? -1 : 0;
}

static result copied(const char *who, address to, address from, size_t nbytes, uintptr_t stream) {
    int target = owner_of(to, nbytes), source = owner_of(from, nbytes);
    if (!is_stream(stream)) return fault(who, "no stream of this device", INVALID_VALUE);
    if ((target == NOBODY) == (source == NOBODY))
        return fault(who, "not between a device and the host", INVALID_VALUE);
    if ((target == NOBODY ? source : target) != here())
        return fault(who, "memory of another device", INVALID_VALUE);
    if (pinned_as(to, nbytes) < 0 || pinned_as(from, nbytes) < 0)
        return fault(who, "memory that is registered in part", INVALID_VALUE);
    memcpy((void *)to, (void *)from, nbytes);
    return SUCCESS;
}

/* Whether the one copies from a device, and the other to one. */
static int is_from_device(address from, size_t nbytes) { return owner_of(from, nbytes) != NOBODY; }

result cuMemcpyDtoHAsync_v2(void *to, address from, size_t nbytes, uintptr_t stream) {
    NEED_CONTEXT();
    NEED(is_from_device(from, nbytes));
    add(&told.copies, 1);
    return copied(__func__, (address)to, from, nbytes, stream);
}

result cuMemcpyHtoDAsync_v2(address to, const void *from, size_t nbytes, uintptr_t stream) {
    NEED_CONTEXT();
    NEED(!is_from_device((address)from, nbytes));
    add(&told.copies, 1);
    return copied(__func__, to, (address)from, nbytes, stream);
}

result cuMemcpyBatchAsync_v2(address *to, address *from, size_t *lengths, size_t number,
                             void *attributes, size_t *starts, size_t num_attributes,
                             uintptr_t stream) {
    NEED_CONTEXT();
    NEED(number > 0 && num_attributes == 1 && starts[0] == 0);
    NEED(stream != LEGACY_STREAM && is_stream(stream));
    /* It comes first in each of them. */
    memcpy(&told.order, attributes, sizeof told.order);
    for (size_t index = 0; index < number; index++) {
        NEED(lengths[index] > 0);
        NEED(pinned_as(to[index], lengths[index]) + pinned_as(from[index], lengths[index]) == 1);
        result error = copied(__func__, to[index], from[index], lengths[index], stream);
        if (error) return error;
    }
    add(&told.batches, 1);
    add(&told.batched, (int)number);
    return SUCCESS;
}

/* As it was before 13.0. */
result cuMemcpyBatchAsync(address *to, address *from, size_t *lengths, size_t number,
                          void *attributes, size_t *starts, size_t num_attributes,
                          size_t *failed, uintptr_t stream) {
    *failed = SIZE_MAX;
    return cuMemcpyBatchAsync_v2(to, from, lengths, number, attributes, starts,
                                 num_attributes, stream);
}

result cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags,
                           int *status) {
    static const struct { const char *name; void *function; } known[] = {
#define KNOWN(name) {#name, name}
        KNOWN(cuInit), KNOWN(cuDriverGetVersion), KNOWN(cuGetErrorString),
        KNOWN(cuDeviceGet), KNOWN(cuDeviceGetAttribute), KNOWN(cuDeviceGetPCIBusId),
        KNOWN(cuDevicePrimaryCtxRetain), KNOWN(cuThreadExchangeStreamCaptureMode),
        KNOWN(cuCtxSynchronize), KNOWN(cuCtxGetStreamPriorityRange),
        KNOWN(cuStreamCreateWithPriority), KNOWN(cuStreamSynchronize),
        KNOWN(cuStreamWaitEvent), KNOWN(cuEventCreate), KNOWN(cuEventRecord),
        KNOWN(cuEventSynchronize), KNOWN(cuMemHostUnregister),
        {"cuDevicePrimaryCtxRelease", cuDevicePrimaryCtxRelease_v2},
        {"cuCtxPushCurrent", cuCtxPushCurrent_v2},
        {"cuCtxPopCurrent", cuCtxPopCurrent_v2},
        {"cuStreamDestroy", cuStreamDestroy_v2},
        {"cuEventDestroy", cuEventDestroy_v2},
        {"cuMemHostRegister", cuMemHostRegister_v2},
        {"cuMemcpyDtoHAsync", cuMemcpyDtoHAsync_v2},
        {"cuMemcpyHtoDAsync", cuMemcpyHtoDAsync_v2},
        {"cuGetProcAddress", cuGetProcAddress_v2},
    };
    *function = NULL;
    if (status) *status = 1;
    if (strcmp(symbol, "cuMemcpyBatchAsync") == 0 &&
        getenv("PRETENDED_WITHOUT_BATCHES") == NULL)
        *function = version >= 13000 ? (void *)cuMemcpyBatchAsync_v2 : (void *)cuMemcpyBatchAsync;
    for (size_t index = 0; index < sizeof known / sizeof *known; index++)
        if (strcmp(symbol, known[index].name) == 0) *function = known[index].function;
    if (*function == NULL) return NOT_FOUND;
    if (status) *status = 0;
    return SUCCESS;
}
