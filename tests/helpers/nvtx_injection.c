/* A stand-in for Nsight: NVTX loads the library that NVTX_INJECTION64_PATH names at its first call and hands it a table
 * of functions to fill in. This one writes a line for each push and pop to the file that NVTX_RECORD names:
 *
 *     push <thread> <domain> <message>
 *     pop <thread> <domain>
 *
 * Only what it uses is declared, so that no header is needed; layouts and numbers are the public ABI of NVTX 3
 * (nvToolsExt.h and nvtxDetail/nvtxTypes.h), which does not change within version 3. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { EXPORT_CALLBACKS = 1, MODULE_CORE2 = 5 };
enum { RANGE_PUSH = 4, RANGE_POP = 5, REGISTER_STRING = 10, DOMAIN_CREATE = 12 };
enum { MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3 };

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    const char *message; /* ASCII, or the handle that register_string returned */
} Event;

typedef void (*Function)(void);
typedef struct {
    size_t size;
    int (*get_module_function_table)(int module, Function ***table, unsigned *size);
} Callbacks;

static FILE *record;

/* Domains and registered strings are handles of our choice: their own names. */
static const char *create_domain(const char *name) { return strdup(name); }
static const char *register_string(const char *domain, const char *string) { return (void)domain, strdup(string); }

static int push(const char *domain, const Event *event) {
    int known = event->message_type == MESSAGE_ASCII || event->message_type == MESSAGE_REGISTERED;
    fprintf(record, "push %ld %s %s\n", syscall(SYS_gettid), domain, known ? event->message : "?");
    return fflush(record), 0;
}

static int pop(const char *domain) {
    fprintf(record, "pop %ld %s\n", syscall(SYS_gettid), domain);
    return fflush(record), 0;
}

int InitializeInjectionNvtx2(const void *(*get_export_table)(uint32_t)) {
    const Callbacks *callbacks = get_export_table(EXPORT_CALLBACKS);
    const char *path = getenv("NVTX_RECORD");
    Function **table;
    unsigned size;
    if (!path || !callbacks || !callbacks->get_module_function_table(MODULE_CORE2, &table, &size)) return 0;
    if (size <= DOMAIN_CREATE || !(record = fopen(path, "a"))) return 0;
    *table[RANGE_PUSH] = (Function)push;
    *table[RANGE_POP] = (Function)pop;
    *table[REGISTER_STRING] = (Function)register_string;
    *table[DOMAIN_CREATE] = (Function)create_domain;
    return 1;
}
