package power

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
)

// TestFanotify cuts the power of this machine's daemon: its cache lies on a loop device on
// a file that qemu-storage-daemon shows and logs.
func TestFanotify(t *testing.T) {
	needFanotify(t)
	s := newSettings(t, 16, 8, 2*time.Second)
	k := kernel{"fanotify", daemon.Fanotify, []string{"zstd", "sha256-64k"}}
	var sum tally
	s.logs(func(seed uint64, options string, cuts int) {
		if t.Failed() {
			return
		}
		t.Run(fmt.Sprintf("log-%d", seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			d := newLoggedDisk(workspace(t))
			t.Logf("mounted with %s", options)
			d.record(t, options, func(t *testing.T, disk *mounted) { work(t, disk, k, rnd, s.while) })
			d.verify(t)
			sum.add(check(t, d.base, d.writes, k, rnd, cuts))
		})
	})
	sum.report(t, k.name)
}

// needFanotify skips a test that this machine cannot do.
func needFanotify(t *testing.T) {
	t.Helper()
	testenv.Root(t)
	for _, tool := range []string{"mkfs.ext4", storageDaemon} {
		testenv.Tool(t, tool)
	}
	for feature, device := range map[string]string{"fuse": "/dev/fuse", "loop devices": "/dev/loop-control"} {
		_, err := os.Stat(device)
		testenv.Kernel(t, feature, err)
	}
	testenv.Kernel(t, "fanotify", fanotify.Supported(t.TempDir()))
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(t.TempDir()))
}

// report prints the line of counts. Enough cuts after which the cache has everything, or
// nothing, have tried nothing.
func (a tally) report(t *testing.T, name string) {
	t.Helper()
	fmt.Printf("power cuts, %s: %v\n", name, a)
	if enough := a.cuts >= 10; !t.Failed() && enough && (a.present == 0 || a.fetched == 0 || a.lost == 0) {
		t.Errorf("nothing was tried: %v", a)
	}
}

const storageDaemon = "qemu-storage-daemon"

// A loggedDisk is files: a disk as it is before and after, and all that was written between.
type loggedDisk struct{ base, disk, writes, shown string }

func newLoggedDisk(dir string) *loggedDisk {
	return &loggedDisk{
		base: filepath.Join(dir, "base"), disk: filepath.Join(dir, "disk"),
		writes: filepath.Join(dir, "writes"), shown: filepath.Join(dir, "shown"),
	}
}

// record calls do with the disk mounted. The process that serves it needs nothing of it.
func (d *loggedDisk) record(t *testing.T, options string, do func(*testing.T, *mounted)) {
	t.Helper()
	makeDisk(t, d.base)
	if err := errors.Join(copySparse(d.disk, d.base), os.WriteFile(d.writes, nil, 0o600), os.WriteFile(d.shown, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Run("work", func(t *testing.T) { // all is unmounted before the storage daemon ends
		d.serve(t)
		m := mountFile(t, d.shown, options)
		do(t, m)
		m.unmount(t)
	})
	if t.Failed() {
		t.FailNow()
	}
}

// serve shows the disk as a file, until the test's end.
func (d *loggedDisk) serve(t *testing.T) {
	t.Helper()
	var said bytes.Buffer
	ready := d.shown + ".pid"
	cmd := exec.Command(storageDaemon,
		"--blockdev", "driver=file,cache.no-flush=on,node-name=disk,filename="+d.disk,
		"--blockdev", "driver=file,cache.no-flush=on,node-name=writes,filename="+d.writes,
		"--blockdev", "driver=blklogwrites,node-name=logged,file=disk,log=writes,log-super-update-interval=1",
		"--export", "type=fuse,id=shown,node-name=logged,writable=on,mountpoint="+d.shown,
		"--pidfile", ready)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // how it ended is in its state
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		select {
		case <-ended:
		case <-time.After(patience):
			_ = cmd.Process.Kill()
			<-ended
			_ = unix.Unmount(d.shown, unix.MNT_DETACH) // it may be gone
		}
		if !cmd.ProcessState.Success() {
			t.Errorf("%s: %s\n%s", storageDaemon, cmd.ProcessState, &said)
		}
	})
	await(t, "the storage daemon", func() bool {
		select {
		case <-ended:
			t.Fatalf("%s does not start: %s\n%s", storageDaemon, cmd.ProcessState, &said)
		default:
		}
		p, err := os.ReadFile(ready)
		return err == nil && len(p) > 0
	})
}

// verify checks that the whole log makes the disk what it is: that nothing lacks in it.
func (d *loggedDisk) verify(t *testing.T) {
	t.Helper()
	f, err := os.Open(d.writes)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	log := parse(t, f)
	flushes := 0
	for _, e := range log.Entries {
		if e.Flags&Flush != 0 {
			flushes++
		}
	}
	t.Logf("%d entries, %d of them flushes", len(log.Entries), flushes)
	if flushes == 0 {
		t.Error("no flush came to the disk")
	}
	disk, err := os.ReadFile(d.disk)
	if err != nil {
		t.Fatal(err)
	}
	again := make(memory, len(disk))
	base, err := os.Open(d.base)
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	if err := errors.Join(copyData(again, base, int64(len(disk))), log.Replay(again, 0, len(log.Entries))); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again, disk) {
		t.Fatal("the log does not make the disk what it is")
	}
}
