package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/testenv"
)

// forget makes the kernel drop what it has of a file in its page cache.
func forget(t *testing.T, name string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const dontNeed = 4 // POSIX_FADV_DONTNEED
	if _, _, e := syscall.Syscall6(syscall.SYS_FADVISE64, f.Fd(), 0, 0, dontNeed, 0, 0); e != 0 {
		t.Fatal(e)
	}
}

// rightOrDenied reads files of an image at m and returns how many failed with EIO. What
// can be read is right.
func rightOrDenied(t *testing.T, m string, files []string) (denied int) {
	t.Helper()
	tree := fixtureList(t)
	for _, f := range files {
		p, err := readAll(f)
		sum := sha256.Sum256(p)
		switch want := tree[strings.TrimPrefix(f, m+"/")].SHA256; {
		case isEIO(err):
			denied++
		case err != nil:
			t.Errorf("%s: %v", f, err)
		case hex.EncodeToString(sum[:]) != want:
			t.Errorf("%s: wrong bytes", f)
		}
	}
	return denied
}

// TestDiskFails: while the disk of the cache cannot be read, reads of a complete image are
// right or EIO; and right as soon as it can be, without anybody doing anything.
func TestDiskFails(t *testing.T) {
	testenv.Root(t)
	root := smallDisk(t, 32<<20)
	if err := fanotify.Supported(root); err != nil {
		testenv.Kernel(t, "fanotify", err)
	}
	disk := filepath.Join(root, "..", "..", "disk") // as smallDisk has it
	d := startDaemon(t, daemonOptions{root: root, completion: true})
	r := localRequest(t, "none")
	m := d.mount(t, r)
	files := regularFiles(t, m)
	if _, err := readAll(files[0]); err != nil {
		t.Fatal(err)
	}
	await(t, "the image to be complete", func() bool { return d.image(t, m).Complete })
	for _, name := range []string{root, disk} { // the file system, and the file below it
		if out, err := exec.Command("sync", "--file-system", name).CombinedOutput(); err != nil {
			t.Fatalf("sync: %v: %s", err, out)
		}
	}
	cold := func() {
		forget(t, filepath.Join(root, "cache", filepath.Base(onlyBlob(t, r))))
		for _, f := range files {
			forget(t, f)
		}
	}
	good, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	cold()
	if err := os.Truncate(disk, 0); err != nil { // reads of the loop device fail now
		t.Fatal(err)
	}
	denied := rightOrDenied(t, m, files)
	f, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(good, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if denied == 0 {
		t.Error("no read failed on a disk that does")
	}
	cold()
	compareTree(t, fixtureList(t), m)
}

// TestDiskReadOnly: ext4 makes itself read-only after an error of its own. Until it is
// mounted again what is there is right and the rest EIO, and images can be unmounted; then
// a new daemon goes on with what it finds.
func TestDiskReadOnly(t *testing.T) {
	testenv.Root(t)
	root := smallDisk(t, 32<<20)
	if err := fanotify.Supported(root); err != nil {
		testenv.Kernel(t, "fanotify", err)
	}
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	mnt := filepath.Dir(root)
	d := startDaemon(t, daemonOptions{root: root})
	r := localRequest(t, "none")
	m := d.mount(t, r)
	files := regularFiles(t, m)
	if _, err := readAll(files[0]); err != nil {
		t.Fatal(err)
	}
	run("mount", "-o", "remount,abort", mnt)
	if err := os.WriteFile(filepath.Join(root, "x"), nil, 0o600); err == nil {
		t.Fatal("the disk can be written to")
	}
	if rightOrDenied(t, m, files) == 0 {
		t.Error("no read failed")
	}
	if _, err := d.Status(t.Context()); err != nil {
		t.Error(err)
	}
	d.umount(t, m)
	d.stop(t)
	run("umount", mnt)
	run("mount", "-o", "loop", filepath.Join(mnt, "..", "disk"), mnt)
	d = startDaemon(t, daemonOptions{root: root})
	compareTree(t, fixtureList(t), d.mount(t, r))
}
