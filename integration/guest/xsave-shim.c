/*
 * Lets user-mode Linux 6.1 run on processors whose extended register state is larger than it expects.
 *
 * UML keeps 2,696 bytes of XSAVE state for each of its processes and writes them back with
 * PTRACE_SETREGSET. The host's kernel takes the state only whole, and with AMX the whole is about
 * 11 KiB, so the write fails and UML kills its init. Preloaded (LD_PRELOAD), this shim stands before
 * ptrace(): a write of the extended state becomes read all, replace the part given, write all. Any
 * other request passes through unchanged.
 *
 * Build: cc -shared -fPIC -O2 -o xsave-shim.so xsave-shim.c
 * Read first: ptrace(2), PTRACE_SETREGSET; Intel's SDM volume 1, chapter 13.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

/* Room for every state component defined so far and some to come. */
#define STATE_BYTES_MAX 65536

typedef long ptrace_function(enum __ptrace_request request, ...);

static ptrace_function *next_ptrace;

__attribute__((constructor)) static void find_next(void)
{
    next_ptrace = (ptrace_function *)dlsym(RTLD_NEXT, "ptrace");
    if (!next_ptrace)
        abort();
}

static long write_state(pid_t pid, const struct iovec *part)
{
    static __thread uint8_t whole[STATE_BYTES_MAX] __attribute__((aligned(64)));
    void *kind = (void *)(uintptr_t)NT_X86_XSTATE;
    struct iovec all = { .iov_base = whole, .iov_len = sizeof(whole) };

    if (next_ptrace(PTRACE_GETREGSET, pid, kind, &all) != 0)
        return -1;
    memcpy(whole, part->iov_base, part->iov_len < all.iov_len ? part->iov_len : all.iov_len);
    return next_ptrace(PTRACE_SETREGSET, pid, kind, &all);
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    pid_t pid = va_arg(arguments, pid_t);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);

    if (request == PTRACE_SETREGSET && (uintptr_t)address == NT_X86_XSTATE)
        return write_state(pid, data);
    return next_ptrace(request, pid, address, data);
}
