// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Processes that end while a device uses their memory, and several at once.
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../pattern.h"
#include "../devices/edu_sva.h"
#include "cases.h"

enum { ENDS = 20, PROCESSES = 8, PAGES = 50, SIZE = PAGES * SVA_PAGE };

// Microseconds until the end: at the start, and after some page requests.
static unsigned moment(unsigned round)
{
    return 500 + round * 1700 % 30000;
}

// The device copies to memory that was never touched, without end.
static void *keep_busy(void *context)
{
    char *from = context;
    int file = sva_open(0);

    for (;;) {
        char *to = sva_map(SIZE);
        if (sva_copy(file, from, to, SIZE) != 0)
            _exit(2);
        munmap(to, SIZE);
    }
    return NULL;
}

// NULL if the device works for a new process.
static const char *works(void)
{
    int status = 0;
    pid_t child = fork();

    if (child == 0) {
        char *from = sva_map(SVA_PAGE), *to = sva_map(SVA_PAGE);
        pattern_fill(from, SVA_PAGE, 9, 0);
        _exit(sva_copies(sva_open(0), from, to, SVA_PAGE, 9) != NULL);
    }
    waitpid(child, &status, 0);
    return status ? "afterwards the device does not work for another process" : NULL;
}

const char *sva_exit(void)
{
    const char *error = NULL;

    for (unsigned round = 0; round < ENDS && !error; round++) {
        int status = 0;
        pid_t child = fork();

        if (child == 0) {
            pthread_t thread;
            pthread_create(&thread, NULL, keep_busy, sva_map(SIZE));
            usleep(moment(round));
            _exit(0);
        }
        waitpid(child, &status, 0);
        error = status ? sva_error("a process ended with status %#x", status) : works();
    }
    sva_say("%d processes ended during DMA", ENDS);
    return error;
}

const char *sva_kill(void)
{
    const char *error = NULL;

    for (unsigned round = 0; round < ENDS && !error; round++) {
        int status = 0;
        pid_t child = fork();

        if (child == 0)
            keep_busy(sva_map(SIZE));
        usleep(moment(round));
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
            error = sva_error("a process ended with status %#x", status);
        else
            error = works();
    }
    sva_say("%d processes were killed during DMA", ENDS);
    return error;
}

static void be_one_of(unsigned number)
{
    int file = sva_open(0);
    char *from = sva_map(SIZE);

    char *to = sva_map(SIZE);
    pattern_fill(from, SIZE, 100 + number, 0);
    const char *error = sva_copies(file, from, to, SIZE, 100 + number);
    if (error)
        fprintf(stderr, "# sva: process %u: %s\n", number, error);
    _exit(error != NULL);
}

const char *sva_processes(void)
{
    unsigned bad = 0;

    for (unsigned number = 0; number < PROCESSES; number++)
        if (fork() == 0)
            be_one_of(number);
    for (unsigned number = 0; number < PROCESSES; number++) {
        int status = 1;
        wait(&status);
        bad += status != 0;
    }
    sva_say("%d at once, with a PASID each", PROCESSES);
    return bad ? sva_error("%u of %d processes failed", bad, PROCESSES) : NULL;
}

struct half {
    unsigned device;
    const char *error, *from;
    char *to;
    uint32_t pasid;
};

static void *copy_half(void *context)
{
    struct half *half = context;
    int file = sva_open(half->device);

    half->pasid = sva_pasid(file);
    int error = sva_copy(file, half->from, half->to, SIZE / 2);
    half->error = error ? strerror(error) : NULL;
    return NULL;
}

const char *sva_devices(void)
{
    char *from = sva_map(SIZE), *to = sva_map(SIZE);
    struct half halves[2];
    pthread_t threads[2];

    if (!sva_exists(1))
        return sva_skip("there is one device");
    pattern_fill(from, SIZE, 5, 0);
    for (unsigned i = 0; i < 2; i++) {
        halves[i] = (struct half){i, NULL, from + i * SIZE / 2, to + i * SIZE / 2, 0};
        pthread_create(&threads[i], NULL, copy_half, &halves[i]);
    }
    for (unsigned i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    for (unsigned i = 0; i < 2; i++)
        if (halves[i].error)
            return sva_error("device %u: %s", i, halves[i].error);
    if (halves[0].pasid != halves[1].pasid || halves[0].pasid == 0)
        return sva_error("PASIDs %u and %u", halves[0].pasid, halves[1].pasid);
    const char *error = sva_holds(to, SIZE, 5);
    munmap(to, SIZE);
    for (unsigned i = 0; i < 2 && !error; i++)
        error = sva_refuses_read(sva_open(i), to);
    sva_say("two devices wrote to one process's memory, and lost it when it was unmapped");
    return error;
}
