package nydus

import (
	"errors"
	"fmt"
	"testing"
)

func TestErrorMessages(t *testing.T) {
	cause := errors.New("because")
	tests := []struct {
		err    error
		status int
		want   string
	}{
		{Unsupported(), 501, `Mount(DaemonAbnormal(Unsupported))`},
		{NotReady(), 503, `Mount(DaemonAbnormal(NotReady))`},
		{UnexpectedEvent("Start"), 400, `Mount(DaemonAbnormal(UnexpectedEvent("Start")))`},
		{BadRequest(nil), 400, `BadRequest`},
		{BadRequest(cause), 400, `BadRequest: because`},
		{ParseBody("missing field `type`", 1, 2), 400, "ParseBody(Error(\"missing field `type`\", line: 1, column: 2))"},
		{missingQuery("mountpoint"), 400, `QueryString("'mountpoint' should be specified in query string")`},
		{Invalid(cause), 500, `Mount(DaemonAbnormal(Other("Invalid argument (os error 22)"))): because`},
		{IO(cause), 500, `Mount(DaemonAbnormal(Other("Input/output error (os error 5)"))): because`},
		{NoCounter(), 404, `Mount(Metrics(Stats(NoCounter)))`},
		{NoEntry("a/b"), 500, `Mount(DaemonAbnormal(Other("No such file or directory (os error 2)"))): blob_cache: cache entry not found: a/b`},
		{Exists(cause), 500, `Mount(DaemonAbnormal(Other("blob_cache: bootstrap blob already exists"))): because`},
		{MissingSupervisor(), 500, `Mount(DaemonAbnormal(UpgradeManager("MissingSupervisorPath")))`},
		{NoFDs(), 500, `Mount(DaemonAbnormal(UpgradeManager(StorageBackendError(NoEnoughFds))))`},
		{CullFailed(cause), 500, `Mount(DaemonAbnormal(Other("failed to cull blob objects from fscache"))): because`},
		{MountFailed(cause), 500, `Mount(MountFilesystem(Other("because")))`},
		{cause, 500, `Mount(DaemonAbnormal(Other("because")))`},
		{errors.New("two\n\"lines\""), 500, `Mount(DaemonAbnormal(Other("two\n\"lines\"")))`},
		{fmt.Errorf("put blob: %w", NotReady()), 503, `Mount(DaemonAbnormal(NotReady))`},
	}
	for _, tc := range tests {
		e := asError(tc.err)
		if got := e.message("Mount"); got != tc.want || e.Status != tc.status {
			t.Errorf("%v: got %d %s, want %d %s", tc.err, e.Status, got, tc.status, tc.want)
		}
	}
	if err := Invalid(cause); !errors.Is(err, cause) {
		t.Errorf("%v does not wrap its cause", err)
	}
}
