/* A libnvidia-ml.so.1 without a GPU: answers the calls that remoted makes, from a board file that is read on every call.
 *
 * The real nvidia-ml-py loads it like the driver's own, so structs, buffer sizes and error codes are exercised for real.
 * The board is named by REMOTED_FAKE_BOARD, else it is the file "board" beside this library; no board means no driver.
 * Whoever changes it writes a new file and renames it over the old one, so no call ever sees half a board.
 *
 * One directive a line. A directive after "gpu" or "slice" speaks of that device, before the first it speaks of the host.
 *
 *     driver 580.95.05                 version of the driver
 *     cuda 13000                       newest CUDA it runs: 1000 * major + 10 * minor
 *     layout old                       process lists come as v2 structs where v3 was asked for (driver 535's break)
 *     hang nvmlDeviceGetName 30        the call ("*": every call) blocks while the board says so, 30 s at most
 *     fail nvmlInitWithFlags 9         the call ("*": every call) returns this nvmlReturn_t
 *     gpu GPU-0000                     the next card, by UUID; the order is the NVML index
 *     slice MIG-0001 2                 a MIG device in place 2 of the last gpu
 *     name NVIDIA A100-SXM4-80GB
 *     memory 85899345920               total bytes
 *     reserved 0                       bytes the driver keeps (in "used" of version 1, apart in version 2)
 *     used 0                           bytes in use that no process explains
 *     minor 0                          N of /dev/nvidiaN
 *     cc 8 0
 *     utilization 40                   percent; absent: not supported
 *     mig 1                            1 on, 0 off; absent: not supported
 *     process 4711 1073741824 C        pid, bytes ("-": not available), in the compute (C), graphics (G) or both (CG) lists
 *     fail nvmlDeviceGetName 15        the call fails on this device only
 *
 * A fake of another library shares the board by including this file with FAKE_BOARD_ONLY defined. Processes that use
 * memory on their own account do not touch the board: each writes and renames its own file BOARD.d/PID with lines
 * "use UUID BYTES", which count as compute processes while that process lives. So nobody needs a lock that a killed
 * process could take with it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MAX_DEVICES 24
#define MAX_PROCESSES 64
#define MAX_FAULTS 16
#define ANY_DEVICE (-1)
#define HIDDEN UINT64_MAX /* NVML_VALUE_NOT_AVAILABLE */

struct process {
    unsigned pid;
    uint64_t bytes;
    int compute, graphics;
};

struct device {
    char uuid[96], name[96];
    int parent, place; /* of a MIG slice; parent is ANY_DEVICE for a card */
    uint64_t memory, reserved, used;
    int minor, major_cc, minor_cc, utilization, mig; /* -1: not supported */
    int processes;
    struct process process[MAX_PROCESSES];
};

struct fault {
    char function[64];
    int device, code, hang_seconds;
};

struct board {
    char driver[64];
    int cuda, old_layout, devices, faults;
    struct device device[MAX_DEVICES];
    struct fault fault[MAX_FAULTS];
};

static void board_path(char *path, size_t size) {
    const char *named = getenv("REMOTED_FAKE_BOARD");
    Dl_info self;
    if (named) {
        snprintf(path, size, "%s", named);
    } else if (dladdr((void *)board_path, &self) && strrchr(self.dli_fname, '/')) {
        int folder = (int)(strrchr(self.dli_fname, '/') - self.dli_fname);
        snprintf(path, size, "%.*s/board", folder, self.dli_fname);
    } else {
        snprintf(path, size, "board");
    }
}

static struct device *add_device(struct board *board, int parent) {
    if (board->devices == MAX_DEVICES)
        return NULL;
    struct device *device = &board->device[board->devices++];
    memset(device, 0, sizeof *device);
    device->parent = parent;
    device->minor = device->major_cc = device->utilization = device->mig = -1;
    return device;
}

static void add_process(struct device *device, unsigned pid, uint64_t bytes, const char *lists) {
    if (device->processes == MAX_PROCESSES)
        return;
    struct process process = {pid, bytes, strchr(lists, 'C') != NULL, strchr(lists, 'G') != NULL};
    device->process[device->processes++] = process;
}

static void add_fault(struct board *board, const char *function, int device, int code, int hang_seconds) {
    if (board->faults == MAX_FAULTS)
        return;
    struct fault *fault = &board->fault[board->faults++];
    snprintf(fault->function, sizeof fault->function, "%s", function);
    fault->device = device;
    fault->code = code;
    fault->hang_seconds = hang_seconds;
}

static int read_host_line(struct board *board, const char *line, int device) {
    char word[64];
    int number;
    if (sscanf(line, "driver %63s", board->driver) == 1 || sscanf(line, "cuda %d", &board->cuda) == 1)
        return 1;
    if (!strcmp(line, "layout old"))
        return board->old_layout = 1;
    if (sscanf(line, "hang %63s %d", word, &number) == 2) {
        add_fault(board, word, device, 0, number);
        return 1;
    }
    if (sscanf(line, "fail %63s %d", word, &number) == 2) {
        add_fault(board, word, device, number, 0);
        return 1;
    }
    return 0;
}

static void read_device_line(struct device *device, const char *line) {
    unsigned pid;
    char bytes[32], lists[4];
    if (sscanf(line, "name %95[^\n]", device->name) == 1 || sscanf(line, "memory %lu", &device->memory) == 1 ||
        sscanf(line, "reserved %lu", &device->reserved) == 1 || sscanf(line, "used %lu", &device->used) == 1 ||
        sscanf(line, "minor %d", &device->minor) == 1 ||
        sscanf(line, "cc %d %d", &device->major_cc, &device->minor_cc) == 2 ||
        sscanf(line, "utilization %d", &device->utilization) == 1 || sscanf(line, "mig %d", &device->mig) == 1)
        return;
    if (sscanf(line, "process %u %31s %3s", &pid, bytes, lists) == 3)
        add_process(device, pid, bytes[0] == '-' ? HIDDEN : strtoull(bytes, NULL, 10), lists);
    else
        fprintf(stderr, "fake driver: cannot read board line: %s\n", line);
}

static struct device *find_device(struct board *board, const char *uuid) {
    for (int i = 0; i < board->devices; i++)
        if (!strcmp(board->device[i].uuid, uuid))
            return &board->device[i];
    return NULL;
}

static void read_claim(struct board *board, const char *folder, const char *pid) {
    char path[8192], uuid[96];
    uint64_t bytes;
    int number = atoi(pid);
    snprintf(path, sizeof path, "%s/%s", folder, pid);
    FILE *file = number > 0 && (kill(number, 0) == 0 || errno == EPERM) ? fopen(path, "re") : NULL;
    while (file && fscanf(file, "use %95s %lu\n", uuid, &bytes) == 2) {
        struct device *device = find_device(board, uuid);
        if (device)
            add_process(device, (unsigned)number, bytes, "C");
    }
    if (file)
        fclose(file);
}

static void read_claims(struct board *board, const char *board_file) {
    char folder[4100];
    snprintf(folder, sizeof folder, "%s.d", board_file);
    DIR *claims = opendir(folder);
    for (struct dirent *entry; claims && (entry = readdir(claims));)
        if (strspn(entry->d_name, "0123456789") == strlen(entry->d_name))
            read_claim(board, folder, entry->d_name);
    if (claims)
        closedir(claims);
}

/* Returns 0 when there is no board. */
static int read_board(struct board *board) {
    char path[4096], line[512];
    struct device *device = NULL;
    int card = ANY_DEVICE;
    board_path(path, sizeof path);
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    memset(board, 0, sizeof *board);
    while (fgets(line, sizeof line, file)) {
        char uuid[96];
        int place;
        line[strcspn(line, "\n")] = 0;
        if (!line[0] || line[0] == '#')
            continue;
        if (sscanf(line, "gpu %95s", uuid) == 1 && (device = add_device(board, ANY_DEVICE))) {
            snprintf(device->uuid, sizeof device->uuid, "%s", uuid);
            card = board->devices - 1;
        } else if (sscanf(line, "slice %95s %d", uuid, &place) == 2 && (device = add_device(board, card))) {
            snprintf(device->uuid, sizeof device->uuid, "%s", uuid);
            device->place = place;
        } else if (!read_host_line(board, line, board->devices - 1) && device) {
            read_device_line(device, line);
        }
    }
    fclose(file);
    read_claims(board, path);
    return 1;
}

#ifndef FAKE_BOARD_ONLY

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15
};

/* A handle stays what it is while cards come and go: it is the interned UUID. */
typedef char *handle;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process_v3;
typedef struct { unsigned pid; unsigned long long bytes; } process_v1;
typedef struct { unsigned gpu, memory; } utilization;

static pthread_mutex_t interning = PTHREAD_MUTEX_INITIALIZER;
static int initialized;

static handle intern(const char *uuid) {
    static char known[256][96];
    int i = 0;
    pthread_mutex_lock(&interning);
    while (known[i][0] && strcmp(known[i], uuid))
        i++;
    strcpy(known[i], uuid);
    pthread_mutex_unlock(&interning);
    return known[i];
}

static const struct fault *fault_of(const struct board *board, const char *function, int device, int hangs) {
    for (int i = 0; i < board->faults; i++) {
        const struct fault *fault = &board->fault[i];
        int same_function = !strcmp(fault->function, "*") || !strcmp(fault->function, function);
        if (same_function && (fault->device == ANY_DEVICE || fault->device == device) && hangs == !!fault->hang_seconds)
            return fault;
    }
    return NULL;
}

/* Reads the board and applies the faults; on success *device, if asked for, is the handle's entry. */
static int enter(struct board *board, const char *function, handle of, struct device **device) {
    const struct fault *fault;
    int index = ANY_DEVICE;
    for (int waited_ms = 0;; waited_ms += 5) {
        struct device *found = NULL;
        if (!read_board(board))
            return DRIVER_NOT_LOADED;
        if (of && (found = find_device(board, of)))
            index = (int)(found - board->device);
        if (device)
            *device = found;
        fault = fault_of(board, function, index, 1);
        if (!fault || waited_ms >= fault->hang_seconds * 1000)
            break;
        nanosleep(&(struct timespec){0, 5000000}, NULL);
    }
    if ((fault = fault_of(board, function, index, 0)))
        return fault->code;
    if (!initialized && strncmp(function, "nvmlInit", 8))
        return UNINITIALIZED;
    return device && !*device ? GPU_IS_LOST : SUCCESS;
}

#define ENTER_HOST(board)                                  \
    struct board board;                                    \
    int entered = enter(&board, __func__, NULL, NULL);     \
    if (entered)                                           \
        return entered

#define ENTER(board, device, of)                           \
    struct board board;                                    \
    struct device *device;                                 \
    int entered = enter(&board, __func__, of, &device);    \
    if (entered)                                           \
        return entered

static int give_text(char *buffer, unsigned size, const char *text) {
    if (strlen(text) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(buffer, text);
    return SUCCESS;
}

static int give_handle(struct board *board, int parent, int position, int by_place, handle *result) {
    for (int i = 0, seen = 0; i < board->devices; i++) {
        if (board->device[i].parent != parent)
            continue;
        if (position == (by_place ? board->device[i].place : seen++)) {
            *result = intern(board->device[i].uuid);
            return SUCCESS;
        }
    }
    return by_place ? NOT_FOUND : INVALID_ARGUMENT;
}

static uint64_t used_bytes(const struct device *device) {
    uint64_t used = device->used;
    for (int i = 0; i < device->processes; i++)
        used += device->process[i].bytes == HIDDEN ? 0 : device->process[i].bytes;
    return used;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ENTER_HOST(board);
    __atomic_add_fetch(&initialized, 1, __ATOMIC_SEQ_CST);
    return SUCCESS;
}

int nvmlShutdown(void) {
    ENTER_HOST(board);
    __atomic_sub_fetch(&initialized, 1, __ATOMIC_SEQ_CST);
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    (void)code;
    return "an error of the fake driver";
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    ENTER_HOST(board);
    return give_text(version, size, board.driver);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    ENTER_HOST(board);
    *version = board.cuda;
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    ENTER_HOST(board);
    *count = 0;
    for (int i = 0; i < board.devices; i++)
        *count += board.device[i].parent == ANY_DEVICE;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, handle *result) {
    ENTER_HOST(board);
    int found = give_handle(&board, ANY_DEVICE, (int)index, 0, result);
    if (found)
        return found;
    /* The true driver refuses the handle of a card that fell off the bus. */
    struct device *device;
    return enter(&board, __func__, *result, &device);
}

int nvmlDeviceGetName(handle of, char *name, unsigned size) {
    ENTER(board, device, of);
    return give_text(name, size, device->name);
}

int nvmlDeviceGetUUID(handle of, char *uuid, unsigned size) {
    ENTER(board, device, of);
    return give_text(uuid, size, device->uuid);
}

int nvmlDeviceGetMinorNumber(handle of, unsigned *minor) {
    ENTER(board, device, of);
    *minor = (unsigned)device->minor;
    return device->minor < 0 ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(handle of, int *major, int *minor) {
    ENTER(board, device, of);
    *major = device->major_cc;
    *minor = device->minor_cc;
    return device->major_cc < 0 ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetMemoryInfo(handle of, memory_v1 *memory) {
    ENTER(board, device, of);
    unsigned long long used = used_bytes(device) + device->reserved;
    *memory = (memory_v1){device->memory, device->memory - used, used};
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(handle of, memory_v2 *memory) {
    ENTER(board, device, of);
    if (memory->version != (sizeof *memory | 2u << 24))
        return 25; /* ARGUMENT_VERSION_MISMATCH */
    unsigned long long used = used_bytes(device);
    memory->total = device->memory;
    memory->reserved = device->reserved;
    memory->free = device->memory - used - device->reserved;
    memory->used = used;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(handle of, utilization *rates) {
    ENTER(board, device, of);
    *rates = (utilization){(unsigned)device->utilization, 0};
    return device->utilization < 0 || device->parent != ANY_DEVICE ? NOT_SUPPORTED : SUCCESS;
}

static int give_processes(const struct board *board, const struct device *device, int graphics, unsigned *count,
                          process_v3 *list) {
    unsigned wanted = 0, room = *count;
    for (int i = 0; i < device->processes; i++) {
        const struct process *process = &device->process[i];
        if (!(graphics ? process->graphics : process->compute))
            continue;
        if (list && wanted < room && board->old_layout)
            ((process_v1 *)list)[wanted] = (process_v1){process->pid, process->bytes};
        else if (list && wanted < room)
            list[wanted] = (process_v3){process->pid, process->bytes, UINT32_MAX, UINT32_MAX};
        wanted++;
    }
    *count = wanted;
    return wanted > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(handle of, unsigned *count, process_v3 *list) {
    ENTER(board, device, of);
    return give_processes(&board, device, 0, count, list);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(handle of, unsigned *count, process_v3 *list) {
    ENTER(board, device, of);
    return device->parent == ANY_DEVICE ? give_processes(&board, device, 1, count, list) : NOT_SUPPORTED;
}

int nvmlDeviceGetMigMode(handle of, unsigned *current, unsigned *pending) {
    ENTER(board, device, of);
    *current = *pending = (unsigned)device->mig;
    return device->mig < 0 ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(handle of, unsigned *count) {
    ENTER(board, device, of);
    *count = device->mig < 0 ? 0 : 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(handle of, unsigned place, handle *result) {
    ENTER(board, device, of);
    return give_handle(&board, (int)(device - board.device), (int)place, 1, result);
}

#endif
