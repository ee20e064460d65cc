package erofsd

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// TestUnheard: a keeper whose log nobody reads any more, because who started it is gone, starts
// the next worker as ever.
func TestUnheard(t *testing.T) {
	testenv.Root(t)
	dir := testDir(t)
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	reads, log, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reads.Close()
	defer log.Close()
	socket := filepath.Join(dir, "api.sock")
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"erofsd", "--root", filepath.Join(dir, "root"), "--socket", socket, "--rlimit-nofile", "0"}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	client := api.NewClient(socket)
	defer client.Close()
	next := func(after int) int {
		t.Helper()
		for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
			v, err := client.Version(t.Context())
			if err == nil && v.PID != after {
				return v.PID
			}
			select {
			case err := <-ended:
				ended <- err
				t.Fatalf("the keeper has ended: %v", err)
			default:
			}
			if time.Now().After(deadline) {
				t.Fatalf("no worker answers: %v", err)
			}
		}
	}
	worker := next(0)
	log.Close()
	reads.Close()
	if err := syscall.Kill(worker, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	next(worker)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the keeper ended: %v", err)
	}
}
