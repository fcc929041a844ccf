// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The only program of the Linux test guest. The kernel's command line controls it:
//
//   twostage.test=LIST       the checks, in this order (boot,iommu,blk,net,rng,clean)
//   twostage.end=HOW         poweroff (the default); exit: with status 1 if a check failed; reboot
//
// and options of the checks (see each). It never returns: init must not.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "checks/checks.h"
#include "figures.h"
#include "kernel/files.h"
#include "kernel/modules.h"
#include "kernel/options.h"
#include "machine.h"
#include "report.h"
#include "watch.h"

enum { CONSOLE_LEVEL = 8, ERRORS_ONLY = 4 };

static const struct {
    const char *name;
    void (*run)(void);
} checks[] = {
    {"boot", check_boot},
    {"iommu", check_iommu},
    {"blk", check_blk},
    {"md5", check_md5},
    {"queues", check_queues},
    {"net", check_net},
    {"rng", check_rng},
    {"rebind", check_rebind},
    {"reboot", check_reboot},
    {"kexec", check_kexec},
    {"clean", check_clean},
    {"intx", check_intx},
    {"isolation", check_isolation},
    {"bypass", check_bypass},
    {"sva", check_sva},
    {"vfio", check_vfio},
    {"figures", take_figures},
    {"vfio-figures", take_vfio_figures},
};

static void set_up(void)
{
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    // The kernel's messages stay in its log: here they would interrupt lines.
    if (!on_command_line("debug"))
        klogctl(CONSOLE_LEVEL, NULL, ERRORS_ONLY);
    setvbuf(stdout, NULL, _IOLBF, 0);
}

static void run(const char *name)
{
    for (unsigned i = 0; i < sizeof(checks) / sizeof(checks[0]); i++) {
        if (strcmp(checks[i].name, name) == 0) {
            checks[i].run();
            return;
        }
    }
    failed("main", "there is no check '%s'", name);
}

static void end(unsigned failures)
{
    const char *how = option("end", "poweroff");

    flush_report();
    sync();
    if (strcmp(how, "exit") == 0)
        exit_machine(failures ? 1 : 0);
    reboot(strcmp(how, "reboot") == 0 ? RB_AUTOBOOT : RB_POWER_OFF);
}

int main(void)
{
    char list[256];
    struct utsname kernel;

    set_up();
    uname(&kernel);
    note("Linux %s %s, init after %s s", kernel.release, kernel.version, strtok(strdup(first_line("/proc/uptime")), " "));
    load_modules("/modules");
    watch_results();
    snprintf(list, sizeof(list), "%s", option("test", "boot,iommu,blk,net,rng,clean"));
    for (char *name = strtok(list, ","); name; name = strtok(NULL, ","))
        run(name);
    note_disks();
    end(summary());
    for (;;)
        pause();
}
