// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The kernel starts another one without a machine reset: the second one finds the IOMMU as the
// first one left it. For images with /kexec.
#include <errno.h>
#include <fcntl.h>
#include <linux/kexec.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../kernel/files.h"
#include "../kernel/options.h"
#include "../report.h"
#include "checks.h"

#define STARTED "twostage.kexec=started"

// The second kernel checks the IOMMU, not throughput: it writes and sends less than the first.
#define LESS "twostage.blk.mib=16 twostage.blk.blocks=100 twostage.net.mib=4"

// The second kernel's command line is the first one's, plus a word that distinguishes them.
static int load(void)
{
    char command_line[4096];
    int kernel = open("/kexec/vmlinuz", O_RDONLY | O_CLOEXEC);
    int initramfs = open("/kexec/initramfs", O_RDONLY | O_CLOEXEC);
    FILE *file = fopen("/proc/cmdline", "re");

    if (kernel < 0 || initramfs < 0 || !file || !fgets(command_line, sizeof(command_line) - 128, file))
        return errno;
    fclose(file);
    command_line[strcspn(command_line, "\n")] = '\0';
    strcat(command_line, " " STARTED " " LESS);
    if (syscall(SYS_kexec_file_load, kernel, initramfs, strlen(command_line) + 1, command_line, 0UL) < 0)
        return errno;
    close(kernel);
    close(initramfs);
    return 0;
}

void check_kexec(void)
{
    if (on_command_line(STARTED)) {
        passed("kexec", "this kernel was started by another one");
        return;
    }
    if (!exists("/kexec/vmlinuz")) {
        skipped("kexec", "this image has no /kexec");
        return;
    }
    int error = load();
    if (error) {
        failed("kexec", "kexec_file_load: %s", strerror(error));
        return;
    }
    summary();
    note("starting the second kernel");
    flush_report();
    sync();
    reboot(RB_KEXEC);
    failed("kexec", "%s", strerror(errno));
}
