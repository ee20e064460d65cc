package smoke

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/logging"
	"github.com/erofsd/erofsd/internal/testenv"
)

// Names of processes, as argv[0], that this program is when it is not the test.
const (
	daemonName = "erofsd-smoke"
	weakName   = "erofsd-without-capability"
)

func TestMain(m *testing.M) {
	switch {
	case daemon.IsHelper(os.Args):
		syscall.Exit(daemon.Helper(os.Args, os.Stdout)) // os.Exit takes a second with the race detector
	case daemon.IsGuard(os.Args):
		os.Exit(daemon.Guard(os.Args))
	case os.Args[0] == daemonName:
		os.Exit(runDaemon(os.Args[1]))
	case os.Args[0] == weakName:
		fmt.Fprintln(os.Stderr, execWeak(os.Args[1:]))
		os.Exit(1)
	}
	testenv.Main(m)
}

// A job is what a daemon's process is told.
type job struct {
	Options daemon.Options
	Socket  string
	Files   uint64 // limit of its descriptors; 0: as it is
}

// figures are what a daemon says of itself when it gets SIGUSR1.
type figures struct {
	Goroutines int
	Heap       int64 // bytes in use
}

// figuresFD is where it says it.
const figuresFD = 3

// runDaemon is what cmd/erofsd does once it knows its options.
func runDaemon(text string) int {
	log, err := logging.New(logging.Options{Level: "debug"})
	if err != nil {
		panic(err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_ = log.Close(ctx) // its reader may be gone
	}()
	if err := serve(text, log); err != nil {
		log.Error("ended", "err", err)
		return 1
	}
	return 0
}

func serve(text string, log *logging.Logger) error {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return err
	}
	if j.Files > 0 {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: j.Files, Max: j.Files}); err != nil {
			return err
		}
	}
	j.Options.Logger = log.Logger
	j.Options.Nydusd.SetLevel = log.SetLevel
	j.Options.Sandbox, j.Options.UnixSockets = daemon.SandboxAuto, true // as erofsd singleton
	tell(log.Logger)
	c, err := daemon.NewControl(j.Options, j.Socket)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return c.Run(ctx, context.Background(), j.Socket)
}

// tell writes figures whenever they are asked for.
func tell(log *slog.Logger) {
	syscall.CloseOnExec(figuresFD)
	out := os.NewFile(figuresFD, "figures")
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	go func() {
		for range asked {
			debug.FreeOSMemory()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			err := json.NewEncoder(out).Encode(figures{runtime.NumGoroutine(), int64(m.HeapInuse)})
			if err != nil {
				log.Error("tell figures", "err", err)
			}
		}
	}()
}

// execWeak becomes the program args[0] without CAP_SYS_RESOURCE, and with few descriptors.
func execWeak(args []string) error {
	runtime.LockOSThread()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: weakLimit / 2, Max: weakLimit}); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_RESOURCE, 0, 0, 0); err != nil {
		return err
	}
	return syscall.Exec(args[0], args, os.Environ())
}
