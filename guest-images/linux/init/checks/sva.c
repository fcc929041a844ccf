// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Shared virtual addressing: processes hand an `edu` device their own pointers, and the kernel
// answers the device's requests for pages that are not there. Afterwards every PASID is free, and
// the kernel has nothing to complain about.
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../devices/edu_sva.h"
#include "../iommu.h"
#include "../kernel/files.h"
#include "../kernel/kernel_log.h"
#include "../kernel/options.h"
#include "../report.h"
#include "../sva/cases.h"
#include "checks.h"

// Seconds for one case, generous for a busy machine, the page requests that a second more is for, and
// the smallest PASID that Linux gives to a process.
enum { LIMIT = 300, REQUESTS = 5, FIRST_PASID = 1 };

static const struct sva_case {
    const char *name;
    const char *(*run)(void);
} cases[] = {
    {"present", sva_present},     {"untouched", sva_untouched}, {"unmap", sva_unmap}, {"protect", sva_protect},
    {"fork", sva_fork},           {"huge", sva_huge},           {"swap", sva_swap},   {"exit", sva_exit},
    {"kill", sva_kill},           {"processes", sva_processes}, {"devices", sva_devices},
};

static struct outcome {
    enum { PASSED, FAILED, SKIPPED } verdict;
    char text[240];
} outcome;

void sva_say(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(outcome.text, sizeof(outcome.text), format, arguments);
    va_end(arguments);
}

const char *sva_skip(const char *why)
{
    outcome.verdict = SKIPPED;
    snprintf(outcome.text, sizeof(outcome.text), "%s", why);
    return NULL;
}

const char *sva_error(const char *format, ...)
{
    static char text[sizeof(outcome.text)];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    return text;
}

static void be(const struct sva_case *one, int result)
{
    alarm(LIMIT + (unsigned)option_number("sva.pages", SVA_PAGES) / REQUESTS);
    const char *error = one->run();
    if (error) {
        outcome.verdict = FAILED;
        snprintf(outcome.text, sizeof(outcome.text), "%s", error);
    }
    _exit(write(result, &outcome, sizeof(outcome)) != sizeof(outcome));
}

static void run_case(const struct sva_case *one)
{
    struct outcome result = {0};
    double start = now();
    int ends[2], status = 0;

    if (pipe(ends) < 0) {
        failed("sva", "%s: %s", one->name, strerror(errno));
        return;
    }
    pid_t child = fork();
    if (child == 0)
        be(one, ends[1]);
    close(ends[1]);
    if (read(ends[0], &result, sizeof(result)) != sizeof(result))
        result = (struct outcome){FAILED, "it said nothing"};
    close(ends[0]);
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status))
        failed("sva", "%s: signal %d after %.1f s", one->name, WTERMSIG(status), now() - start);
    else if (result.verdict == FAILED)
        failed("sva", "%s: %s", one->name, result.text);
    else if (result.verdict == SKIPPED)
        skipped("sva", "%s: %s", one->name, result.text);
    else
        passed("sva", "%s: %s (%.1f s)", one->name, result.text, now() - start);
}

// The PASID that a new process gets; 0 or -errno if it gets none. This process, init, never ends, and
// its PASID would stay in use.
static int next_pasid(void)
{
    int pasid = 0;
    int ends[2];

    if (pipe(ends) < 0)
        return 0;
    pid_t child = fork();
    if (child == 0) {
        int file = sva_open(0);
        pasid = file < 0 ? -errno : (int)sva_pasid(file);
        _exit(write(ends[1], &pasid, sizeof(pasid)) != sizeof(pasid));
    }
    close(ends[1]);
    if (read(ends[0], &pasid, sizeof(pasid)) != sizeof(pasid))
        pasid = 0;
    close(ends[0]);
    waitpid(child, NULL, 0);
    return pasid;
}

static bool first_is_free(const void *context)
{
    (void)context;
    return next_pasid() == FIRST_PASID;
}

static void say(const char *line)
{
    note("%s", line);
}

static void check_end(void)
{
    static const char *const complaints[] = {
        "does not end", "page request", "Page request", "iopf", "PRQ", "WARNING:", "BUG:", "rcu: INFO", "hung task", NULL};

    if (wait_until(first_is_free, NULL))
        passed("sva", "all PASIDs are free");
    else
        failed("sva", "PASID %d is still in use", FIRST_PASID);
    if (log_lines(complaints, say) + log_lines(iommu.faults, say) == 0)
        passed("sva", "the kernel has nothing to complain about");
    else
        failed("sva", "the kernel complains");
}

static bool is_in(const char *list, const char *name)
{
    size_t length = strlen(name);

    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (strncmp(at, name, length) == 0 && (at[length] == ',' || !at[length]))
            return true;
    return false;
}

void check_sva(void)
{
    const char *error = sva_load();

    if (error) {
        failed("sva", "edu_sva.ko: %s", error);
        return;
    }
    if (!sva_exists(0)) {
        skipped("sva", "there is no edu device");
        return;
    }
    int pasid = next_pasid();
    if (pasid == -EOPNOTSUPP) {
        // Stable kernels refuse on x86, as they change their own page tables, which the device walks,
        // too, without an invalidation (6.12.117; not 7.2).
        skipped("sva", "this kernel shares no address spaces with devices");
        return;
    }
    if (pasid <= 0) {
        failed("sva", "the kernel gives the device no address space: %s", strerror(-pasid));
        return;
    }
    char list[128];
    snprintf(list, sizeof(list), "%s", option("sva", ""));
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        if (!list[0] || is_in(list, cases[i].name))
            run_case(&cases[i]);
    check_end();
}
