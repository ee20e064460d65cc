package main

import (
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/kernel"
	"github.com/erofsd/erofsd/internal/sandbox"
)

// A transport as doctor shows it: what it needs, and the probe of each need.
type transport struct {
	name   string
	probes []func(dir string) error
	unsafe func(v kernel.Version) string // what a kernel that can do it lacks for production
}

func transports() []transport {
	return []transport{
		{"fanotify", []func(string) error{fanotify.Supported, erofs.Supported}, unsafeFanotify},
		{"cachefiles", []func(string) error{cachefilesSupported}, unsafeCachefiles},
	}
}

func cachefilesSupported(dir string) error { return cachefiles.Supported("", dir) }

// unsafeFanotify knows the releases that docs/operations.md asks for.
func unsafeFanotify(v kernel.Version) string {
	if before(v, "6.18.30") || !before(v, "7.0") && before(v, "7.0.7") {
		return "lacks the fix of CVE-2026-46150 unless your distribution has brought it: 6.18.30 and 7.0.7 have it"
	}
	return ""
}

func unsafeCachefiles(v kernel.Version) string {
	if before(v, "6.1.147") || !before(v, "6.2") && before(v, "6.12.40") {
		return "may lack restore, or fixes of races that crash the machine: 6.1.147 and 6.12.40 have them"
	}
	return ""
}

// before reports whether v is earlier than a version of ours.
func before(v kernel.Version, than string) bool {
	w, err := kernel.ParseVersion(than)
	return err == nil && v.Compare(w) < 0
}

// examineKernel finds what the kernel can do.
func (d *doctor) examineKernel() error {
	dir, remove, err := scratch(d.at(d.root))
	if err != nil {
		return err
	}
	defer remove()
	v, verr := kernel.Running()
	usable := false
	for _, t := range d.transports {
		switch err := t.diagnose(dir); {
		case err != nil:
			d.add(note, t.name, "", "no: %v", err)
		case verr == nil && t.unsafe(v) != "":
			usable = true
			d.add(warning, t.name, "before production, boot a later kernel", "yes, but Linux %v %s", v, t.unsafe(v))
		default:
			usable = true
			d.add(fine, t.name, "", "yes")
		}
	}
	if !usable {
		d.add(failure, "kernel", "boot a kernel that can do one of them, as root (docs/operations.md says which)", "no transport works here")
	}
	if r := sandbox.Probe(); r.Complete() {
		d.add(fine, "sandbox", "", "%v", r)
	} else {
		d.add(warning, "sandbox", "a later kernel has all of it; erofsd --sandbox=strict does not start without", "in part: %v", r)
	}
	if types, err := os.ReadFile(d.at("proc/filesystems")); err == nil && !strings.Contains(string(types), "\toverlay\n") {
		d.add(failure, "overlayfs", "modprobe overlay; and to have it after a boot: echo overlay > /etc/modules-load.d/overlay.conf", "the kernel has no overlayfs, in which containers write")
	} else if err == nil {
		d.add(fine, "overlayfs", "", "yes")
	}
	return nil
}

// diagnose returns the first thing that t lacks.
func (t transport) diagnose(dir string) error {
	for _, probe := range t.probes {
		if err := probe(dir); err != nil {
			return err
		}
	}
	return nil
}

// Numbers of statfs(2) for file systems that have pre-content events.
var cacheFileSystems = map[int64]string{0xef53: "ext4", 0x58465342: "XFS", 0x9123683e: "btrfs"}

// leastFree is how much of a disk should be free: below it containers fail too.
const leastFree = 1 << 30

// examineDisk finds whether the cache can be where it is to be.
func (d *doctor) examineDisk() {
	var st syscall.Statfs_t
	dir := existing(d.at(d.root))
	if err := syscall.Statfs(dir, &st); err != nil {
		d.add(failure, "cache", "choose another --root", "%s: %v", dir, err)
		return
	}
	name, known := cacheFileSystems[int64(st.Type)]
	free := int64(st.Bavail) * st.Bsize
	switch {
	case !known:
		d.add(failure, "cache", "choose a --root (daemon.root) on ext4, XFS or btrfs", "%s is on a file system (%#x) that cannot have the cache", dir, st.Type)
	case free < leastFree:
		d.add(warning, "cache", "make room, or set --cache-high", "%s: %s, %d MiB free", dir, name, free>>20)
	case st.Files > 0 && st.Ffree < 1000:
		d.add(warning, "cache", "remove files: there are too many", "%s: %s, %d more files are possible", dir, name, st.Ffree)
	default:
		d.add(fine, "cache", "", "%s: %s, %d GiB free", dir, name, free>>30)
	}
}

// stUnsync is STA_UNSYNC of adjtimex(2).
const stUnsync = 0x40

// clockSynced reports whether somebody keeps the clock right.
func clockSynced() (bool, error) {
	var t syscall.Timex
	_, err := syscall.Adjtimex(&t)
	return t.Status&stUnsync == 0, err
}

// born is a time before which no clock can be right.
var born = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

// examineClock finds whether certificates and logins will be taken.
func (d *doctor) examineClock() {
	const do = "have it set: timedatectl set-ntp true, or chrony"
	synced, err := d.synced()
	switch {
	case d.now().Before(born):
		d.add(failure, "clock", do, "it is %s here: certificates and logins will be refused", d.now().UTC().Format(time.DateTime))
	case err != nil:
		d.add(note, "clock", "", "it cannot be said whether it is right: %v", err)
	case !synced:
		d.add(warning, "clock", do, "nobody keeps it right; when it is wrong, certificates and logins are refused")
	default:
		d.add(fine, "clock", "", "is kept right")
	}
}
