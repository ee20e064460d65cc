package torture

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/keeper"
	"github.com/erofsd/erofsd/internal/testenv"
)

// Names of processes, as argv[0], that this program is when it is not the test.
const (
	keeperName = "erofsd-torture"
	workerName = "erofsd-torture-worker"
	hogName    = "erofsd-torture-hog"
)

func TestMain(m *testing.M) {
	switch {
	case daemon.IsHelper(os.Args):
		syscall.Exit(daemon.Helper(os.Args, os.Stdout)) // os.Exit takes a second with the race detector
	case daemon.IsGuard(os.Args):
		os.Exit(daemon.Guard(os.Args))
	case os.Args[0] == keeperName:
		os.Exit(runKeeper(os.Args[1:]))
	case os.Args[0] == hogName:
		os.Exit(runHog())
	case os.Args[0] == workerName:
		os.Exit(runWorker(os.Args[1:]))
	}
	testenv.Main(m, func() {
		fmt.Printf("total: %d workers died; %s, %d where they had to\n", total.deaths.Load(), &total.tally, total.denied.Load())
	})
}

// runKeeper is what cmd/erofsd does as keeper.
func runKeeper(args []string) int {
	if os.Getenv("LISTEN_PID") == "self" { // nobody else knows it before
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	}
	code, err := keeper.Run(context.Background(), keeper.Options{
		Command: func(exe string) *exec.Cmd {
			if exe == "" {
				exe = "/proc/self/exe"
			}
			cmd := exec.Command(exe, args...)
			cmd.Args[0] = workerName
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
			return cmd
		},
		Logger:       slog.New(slog.NewTextHandler(os.Stderr, nil)),
		StateVersion: daemon.StateVersion,
		HangTimeout:  hangTimeout(),
		// The product gives a worker that dies again and again more and more time.
		Backoff: keeper.Backoff{Min: time.Millisecond, Max: 10 * time.Millisecond, Stable: 100 * time.Millisecond},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "keeper:", err)
	}
	return code
}

// runWorker is what cmd/erofsd does as worker. args are the API's socket, and the options
// in JSON.
func runWorker(args []string) int {
	if err := enterCgroup(); err != nil {
		fmt.Fprintln(os.Stderr, "enter the cgroup:", err)
		return 1
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	holder, err := daemon.Connect()
	signal.Ignore(syscall.SIGPIPE) // the keeper may be gone, and with it who reads the log
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var o daemon.Options
	if err == nil {
		err = json.Unmarshal([]byte(args[1]), &o)
	}
	o.Logger, o.Sandbox = log, daemon.SandboxAuto // as the product's worker
	if err == nil && holder != nil {
		o.Holder, err = holder, holder.Begin(ctx, log)
	}
	var c *daemon.Control
	if err == nil {
		c, err = daemon.NewControl(o, args[0])
	}
	if err == nil {
		force, stopForce := signal.NotifyContext(context.Background(), syscall.SIGUSR1)
		defer stopForce()
		err = c.Run(ctx, force, args[0])
	}
	if err != nil {
		log.Error("ended", "err", err)
		return 1
	}
	return 0
}
